"""SD-Turbo and its kin: Stable Diffusion 1.x/2.x, one text encoder."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, Shape, Stage
from turbochain.runtime.manifest import Chain

Inputs = dict[str, tuple[str, tuple[int, ...]]]


def tokens(configs: Mapping[str, Any], component: str) -> int:
    """Length of a prompt in tokens (77 for CLIP)."""
    return configs[component]["max_position_embeddings"]


def ids(name: str, component: str) -> Any:
    """The inputs of a text encoder: [B, tokens] int32."""
    return lambda configs, shape: {name: ("int32", (shape.batch, tokens(configs, component)))}


def step_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    """The inputs that every UNet step has, in `stages.UNetStep.forward`'s order."""
    unet = configs["unet"]
    latents = (shape.batch, unet["out_channels"], shape.height // 8, shape.width // 8)
    return {
        "latents": ("float32", latents),
        "noise": ("float32", latents),
        "timestep_embedding": ("float32", (1, unet["block_out_channels"][0])),
        **dict.fromkeys(("input_scale", "a", "b", "c"), ("float32", (1,))),
    }


TABLE_INPUTS = ("timestep_embedding", "input_scale", "a", "b", "c")


def decoder_inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    """The decoder reads what the last step made."""
    return {"next_latents": step_inputs(configs, shape)["latents"]}


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
    if len(vae["block_out_channels"]) != 4:
        problems.append(f"the VAE reduces by {2 ** (len(vae['block_out_channels']) - 1)}, supported is 8")
    for component in ("text_encoder", "text_encoder_2"):
        if configs.get(component, {}).get("use_attention_mask"):
            problems.append(f"{component} asks for an attention mask")
    return problems


def _inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
    text = configs["text_encoder"]
    states = (shape.batch, tokens(configs, "text_encoder"), text["hidden_size"])
    return {**step_inputs(configs, shape), "prompt_embeds": ("float32", states)}


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
        "unet": Stage(
            role="unet",
            component="unet",
            module="UNetStep",
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
    ),
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    embeds=lambda configs, call: {"prompt_embeds": call["encoder_hidden_states"]},
    check=check,
)
