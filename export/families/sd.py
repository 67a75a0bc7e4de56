"""SD-Turbo and its kin: Stable Diffusion 1.x/2.x, one text encoder."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, Inputs, Shape, Stage
from turbochain.export.families.common import TABLE_INPUTS, VAE_DECODER, check, ids, step_inputs, time_inputs, tokens
from turbochain.runtime.bundle.manifest import Chain


def _check(configs: Mapping[str, Any]) -> list[str]:
    """`check`, and whether every ResNet adds a projection of the time, as `stages.TimeProjections` has it."""
    problems, unet = check(configs), configs["unet"]
    blocks = (*unet["down_block_types"], *unet["up_block_types"])
    kinds = {unet.get("resnet_time_scale_shift", "default"), *("ada_group" for b in blocks if b.startswith("K"))}
    for kind in sorted(kinds - {"default", "scale_shift"}):
        problems.append(f"the UNet's ResNets read the time as {kind!r}, supported are 'default' and 'scale_shift'")
    return problems


def _inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    text = configs["text_encoder"]
    states = (shape.batch, tokens(configs, "text_encoder"), text["hidden_size"])
    return {**step_inputs(configs, shape, "time_projections"), "prompt_embeds": ("float32", states)}


FAMILY = Family(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    components=("text_encoder", "unet", "vae"),
    tokenizers={"input_ids": "tokenizer"},
    stages={
        "text_encoder": Stage(
            role="text_encoder",
            component="text_encoder",
            module="TextEncoder",
            inputs=ids("input_ids", "text_encoder"),
            outputs=("prompt_embeds",),
        ),
        "time": Stage(
            role="time_embedding",
            component="unet",
            module="TimeProjections",
            inputs=time_inputs,
            outputs=("time_projections",),
            precision="fp32",  # it runs at load, where speed does not count
        ),
        "unet": Stage(
            role="unet",
            component="unet",
            module="SDUNetStep",
            inputs=_inputs,
            outputs=("next_latents",),
        ),
        "vae_decoder": VAE_DECODER,
    },
    chain=Chain(
        before=("text_encoder",),
        loop=("unet",),
        after=("vae_decoder",),
        carry={"next_latents": "latents"},
        inputs=("input_ids", "latents"),
        step_inputs=("noise",),
        table_inputs=TABLE_INPUTS,
        output="image",
        once=("time",),
    ),
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    embeds=lambda configs, call: {"prompt_embeds": call["encoder_hidden_states"]},
    check=_check,
    tiny_vae="madebyollin/taesd",
    latents_scale=0.18215,
)
