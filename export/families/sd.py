"""SD-Turbo and its kin: Stable Diffusion 1.x/2.x, one text encoder."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, GraphSpec, Inputs, Shape, SteeredBy
from turbochain.export.families.common import check, ids, tokens, unet_inputs, vae_decoder
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE, Stage


def _check(configs: Mapping[str, Any]) -> list[str]:
    """Return `check`'s phrases, and whether the text encoder reads all tokens, and every ResNet adds a projection of
    the time, as `tracing.time.sd` has it."""
    problems, unet = check(configs), configs["unet"]
    if configs["text_encoder"].get("use_attention_mask"):  # which the SDXL pipeline does not read
        problems.append("the text encoder asks for an attention mask")
    blocks = (*unet["down_block_types"], *unet["up_block_types"])
    kinds = {unet.get("resnet_time_scale_shift", "default"), *("ada_group" for b in blocks if b.startswith("K"))}
    for kind in sorted(kinds - {"default", "scale_shift"}):
        problems.append(f"the UNet's ResNets read the time as {kind!r}, supported are 'default' and 'scale_shift'")
    return problems


def _unet_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    text = configs["text_encoder"]
    states = (shape.batch, tokens(configs, "text_encoder"), text["hidden_size"])
    return {**unet_inputs(configs, shape, "time_projections"), "prompt_embeds": ("float32", states)}


FAMILY = Family(
    name="sd",
    title="SD-Turbo, SD 1.x and 2.x",
    pipelines={
        TEXT_TO_IMAGE: "StableDiffusionPipeline",
        IMAGE_TO_IMAGE: "StableDiffusionImg2ImgPipeline",
        INPAINTING: "StableDiffusionInpaintPipeline",
    },
    kin=(
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    components=("text_encoder", "unet", "vae"),
    tokenizers={"input_ids": "tokenizer"},
    graphs={
        "text_encoder": GraphSpec(
            role="text_encoder",
            component="text_encoder",
            module="TextEncoder",
            inputs=ids("input_ids", "text_encoder"),
            sized=False,
            outputs=("prompt_embeds",),
        ),
        "unet": GraphSpec(
            role="unet",
            component="unet",
            module="SDUNet",
            inputs=_unet_inputs,
            outputs=("prediction",),
        ),
        "vae_decoder": vae_decoder("VaeDecoder"),
    },
    vae_encoder="VaeEncoder",
    prompt_stages=(Stage("text_encoder", "prompt", "text"),),
    columns=("time_projections",),
    constants={},
    slot_columns=("activated_time_embedding",),
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    zeros=lambda index: False,
    embeds=lambda configs, call: {"prompt_embeds": call["encoder_hidden_states"]},
    check=_check,
    tiny_vae="madebyollin/taesd",
    latents_scale=0.18215,
    steered={
        "controlnet": SteeredBy(
            {
                TEXT_TO_IMAGE: "StableDiffusionControlNetPipeline",
                IMAGE_TO_IMAGE: "StableDiffusionControlNetImg2ImgPipeline",
            },
            module="SDControlNet",
        ),
        "t2i_adapter": SteeredBy({TEXT_TO_IMAGE: "StableDiffusionAdapterPipeline"}),
    },
)
