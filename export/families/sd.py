"""SD-Turbo and its kin: Stable Diffusion 1.x/2.x, one text encoder."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, Inputs, Shape, Stage, decoder_channels
from turbochain.runtime.bundle.manifest import Chain


def tokens(configs: Mapping[str, Any], component: str) -> int:
    """Length of a prompt in tokens (77 for CLIP)."""
    return configs[component]["max_position_embeddings"]


def ids(name: str, component: str) -> Any:
    """The inputs of a text encoder: [B, tokens] int32."""
    return lambda configs, shape: {name: ("int32", (shape.batch, tokens(configs, component)))}


def latents(configs: Mapping[str, Any], shape: Shape) -> tuple[str, tuple[int, ...]]:
    """What goes round the loop: [B, 4, H/8, W/8] fp32."""
    return "float32", (shape.batch, configs["unet"]["out_channels"], shape.height // 8, shape.width // 8)


def time_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    """A timestep as its sinusoidal embedding: [1, n] fp32."""
    return {"timestep_embedding": ("float32", (1, configs["unet"]["block_out_channels"][0]))}


def step_inputs(configs: Mapping[str, Any], shape: Shape, time: str) -> Inputs:
    """The inputs that every UNet step has, in `stages.UNetStep.forward`'s order; `time`: the output of that graph."""
    return {
        "latents": latents(configs, shape),
        "noise": latents(configs, shape),
        time: None,
        **dict.fromkeys(("input_scale", "a", "b", "c"), ("float32", (1,))),
    }


TABLE_INPUTS = ("timestep_embedding", "input_scale", "a", "b", "c")


def decoder_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    """The decoder reads what the last step made."""
    return {"next_latents": latents(configs, shape)}


VAE_DECODER = Stage(
    role="vae_decoder",
    component="vae",
    module="VaeDecoder",
    inputs=decoder_inputs,
    outputs=("image",),
)


def check(configs: Mapping[str, Any], addition: str | None = None) -> list[str]:
    """What of these configs no stage here can express, as phrases."""
    unet, vae = configs["unet"], configs["vae"]
    wanted = {
        "addition_embed_type": addition,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
    }
    problems = [
        f"the UNet has {key}={unet.get(key, default)!r}, supported is {default!r}"
        for key, default in wanted.items()
        if unet.get(key, default) != default
    ]
    if unet["in_channels"] != unet["out_channels"]:
        problems.append(f"the UNet reads {unet['in_channels']} channels and predicts {unet['out_channels']}")
    if (reduces := vae.get("upsampling_scaling_factor", 2) ** (len(decoder_channels(vae)) - 1)) != 8:
        problems.append(f"the VAE reduces by {reduces}, supported is 8")
    for component in ("text_encoder", "text_encoder_2"):
        if configs.get(component, {}).get("use_attention_mask"):
            problems.append(f"{component} asks for an attention mask")
    return problems


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
