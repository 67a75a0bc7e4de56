"""What the families share: the step and decoder graphs, the text-to-image chain, the checks of configs."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.families import Family, GraphSpec, Inputs, Shape, decoder_channels
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Chain, Draw, Feed, Stage, TableEntry

ARITHMETIC = "step"
"""The graph that every chain has and that has no weights."""


def tokens(configs: Mapping[str, Any], component: str) -> int:
    """Return the length of a prompt in tokens (77 for CLIP)."""
    return configs[component]["max_position_embeddings"]


def ids(name: str, component: str) -> Any:
    """Return the inputs of a text encoder: [B, tokens] int32."""
    return lambda configs, shape: {name: ("int32", (shape.batch, tokens(configs, component)))}


def latents(configs: Mapping[str, Any], shape: Shape) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of the latents: [B, 4, H/8, W/8] fp32."""
    return "float32", (shape.batch, configs["unet"]["out_channels"], shape.height // 8, shape.width // 8)


def unet_inputs(configs: Mapping[str, Any], shape: Shape, *columns: str) -> Inputs:
    """Return the inputs that every UNet begins with: latents, input_scale, and the columns of the time."""
    return {
        "latents": latents(configs, shape),
        "input_scale": ("float32", (1,)),
        **dict.fromkeys(columns),
    }


def vae_decoder(module: str) -> GraphSpec:
    """Return the VAE's decoder, as this class of export.tracing.modules."""
    return GraphSpec(
        role="vae_decoder",
        component="vae",
        module=module,
        inputs=lambda configs, shape: {"next_latents": latents(configs, shape)},
        outputs=("image",),
    )


def step(K: int) -> GraphSpec:
    """Return the sampler's row: `S' = m·S + v·prediction + w·noise`, with K tensors in S."""

    def inputs(configs: Mapping[str, Any], shape: Shape) -> Inputs:
        dtype, of_latents = latents(configs, shape)
        found: Inputs = dict.fromkeys(("latents", "prediction", "noise"), (dtype, of_latents))
        found |= {"m": (dtype, (K, K)), "v": (dtype, (K,)), "w": (dtype, (K,))}
        return found | ({"history": (dtype, (K - 1, *of_latents))} if K > 1 else {})

    return GraphSpec(
        role="step",
        component="",
        module="Step",
        inputs=inputs,
        outputs=("next_latents", "next_history") if K > 1 else ("next_latents",),
        arguments=lambda shape: (K,),
        precision="fp32",
    )


def graphs(family: Family, K: int) -> dict[str, GraphSpec]:
    """Return graph → spec, all that a bundle of the family needs."""
    return {**family.graphs, ARITHMETIC: step(K)}


def precisions(family: Family, asked: str, vae: str | None = None) -> dict[str, str]:
    """Return graph → precision, if the user asked for `asked`, and for `vae` for the VAE."""
    return {
        name: spec.precision or (vae if vae and spec.component == "vae" else asked)
        for name, spec in graphs(family, 1).items()
    }


def text_to_image(family: Family, shape: Shape, tables: dict[str, TableEntry]) -> Chain:
    """Return the chain of a family's text-to-image pipeline."""
    feeds = {
        **{name: Feed("ids", "call") for name in family.tokenizers},
        "latents": Feed("noise", "call", scale="init_noise_sigma"),
        **({"history": Feed("history", "call")} if shape.K > 1 else {}),
        "noise": Feed("noise", "step"),
        **{name: Feed("column", "call") for name in family.constants},
        **{name: Feed("column", "step") for name in ("input_scale", *family.columns, "m", "v", "w")},
    }
    return Chain(
        task=TEXT_TO_IMAGE,
        size=(shape.height, shape.width),
        batch=shape.batch,
        K=shape.K,
        stages=(
            *family.prompt_stages,
            Stage("unet", "step", "prediction"),
            Stage(ARITHMETIC, "step", "state"),
            Stage("vae_decoder", "end", "picture"),
        ),
        feeds=feeds,
        draws=(Draw("latents", "picture"), Draw("noise", "picture")),
        carry={"next_latents": "latents", **({"next_history": "history"} if shape.K > 1 else {})},
        tables_file=f"tables/{TEXT_TO_IMAGE}.safetensors",
        tables=tables,
        output="image",
    )


def check(configs: Mapping[str, Any], addition: str | None = None) -> list[str]:
    """Return what of these configs no graph here can express, as phrases."""
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
    elif (taken := 2 ** (len(decoder_channels(vae)) - 1)) != 8:
        problems.append(f"the VAE reduces by 8, and diffusers' pipelines take it for {taken} by its number of blocks")
    return problems
