"""What the families share: inputs of graphs, the VAE's stage, the checks of configs."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Inputs, Shape, Stage, decoder_channels


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
