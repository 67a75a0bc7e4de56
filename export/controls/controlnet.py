"""ControlNet: half a UNet that reads a picture too, and makes residuals for the UNet in every step. Torch-free."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.controls.kind import Configs, Control, ControlKind, levels, picture
from turbochain.export.families import Family, GraphSpec, Inputs, Shape
from turbochain.runtime.bundle.manifest import Feed

EMBEDDING, SCALE = "control_embedding", "conditioning_scale"
DOWN, MID = "down_block_residual_", "mid_block_residual"


def residuals(config: Mapping[str, Any], shape: Shape) -> Inputs:
    """Return the residuals that a UNet of this config adds to what its down blocks and its middle make, fp32.

    A ControlNet of the same widths and layers makes them.
    """
    of_levels, layers = levels(config, shape), config.get("layers_per_block", 2)
    counts = [layers] * len(of_levels) if isinstance(layers, int) else layers
    made = [of_levels[0]]
    for i, (channels, size) in enumerate(of_levels):
        made += [(channels, size)] * counts[i]
        made += [(channels, after[1]) for after in of_levels[i + 1 : i + 2]]
    named = {f"{DOWN}{i}": tensor for i, tensor in enumerate(made)} | {MID: of_levels[-1]}
    return {name: ("float32", (shape.batch, channels, *size)) for name, (channels, size) in named.items()}


def attends(config: Mapping[str, Any]) -> bool:
    """Return whether a ControlNet reads the prompt: the small ones for SDXL have no attention."""
    blocks, depths = config["down_block_types"], config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(blocks) if isinstance(depths, int) else depths
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    return any("CrossAttn" in block and depth for block, depth in zip(blocks, depths, strict=True)) or (
        middle and bool(depths[-1])
    )


def own(column: str, control: Control) -> str:
    """Return the name of a time column that belongs to this ControlNet alone."""
    return f"{column}-{control.name}"


def _specs(family: Family, configs: Configs, control: Control) -> dict[str, GraphSpec]:
    config, unet = configs[control.component], family.graphs["unet"]
    columns, reads_text = {*family.columns, *family.constants}, attends(config)

    def inputs(configs: Configs, shape: Shape) -> Inputs:
        found: Inputs = {}
        for name, tensor in unet.inputs(configs, shape).items():
            if reads_text or tensor is None or len(tensor[1]) != 3:  # a prompt's states are [B, tokens, D]
                found[own(name, control) if name in columns else name] = tensor
        channels, size = levels(config, shape)[0]
        return {**found, EMBEDDING: ("float32", (shape.batch, channels, *size)), SCALE: ("float32", (1,))}

    embedding = GraphSpec(
        role="controlnet_embedding",
        component=control.component,
        module="ControlNetEmbedding",
        inputs=lambda configs, shape: picture(3, shape),
        outputs=(EMBEDDING,),
    )
    net = GraphSpec(
        role="controlnet",
        component=control.component,
        module=family.steered[KIND.name].module,
        inputs=inputs,
        outputs=tuple(residuals(config, Shape(8, 8, 1))),
    )
    return {f"controlnet_embedding-{control.name}": embedding, control.component: net}


def _feeds(family: Family, configs: Configs, control: Control) -> dict[str, Feed]:
    return {
        "control_image": Feed("image", "call"),
        SCALE: Feed("number", "step"),
        **{own(name, control): Feed("column", "call") for name in family.constants},
        **{own(name, control): Feed("column", "step") for name in family.columns},
    }


_SAME = {"in_channels": 4, "cross_attention_dim": 1280, "addition_embed_type": None}
"""What a ControlNet and its UNet must have in common, and what is meant if a config does not say."""

_ONLY = {
    "conditioning_channels": 3,
    "global_pool_conditions": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
}
"""What these graphs can express."""


def _problems(configs: Configs, component: str, shape: Shape) -> list[str]:
    config, unet = configs[component], configs["unet"]
    if residuals(config, shape) != residuals(unet, shape):
        names = ("block_out_channels", "layers_per_block")
        return [f"its {', '.join(names)} are {_told(config, names)}, and the UNet's are {_told(unet, names)}"]
    same = _SAME if attends(config) else {k: v for k, v in _SAME.items() if k != "cross_attention_dim"}
    if config.get("addition_embed_type") == "text_time":
        same = same | {"addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}
    found = [
        f"it has {key}={config.get(key, value)!r}, and the UNet {unet.get(key, value)!r}"
        for key, value in same.items()
        if config.get(key, value) != unet.get(key, value)
    ]
    found += [
        f"it has {key}={config[key]!r}, supported is {value!r}"
        for key, value in _ONLY.items()
        if config.get(key, value) != value
    ]
    if (kind := config.get("resnet_time_scale_shift", "default")) not in ("default", "scale_shift"):
        found.append(f"its ResNets read the time as {kind!r}, supported are 'default' and 'scale_shift'")
    if (reduces := 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)) != 8:
        found.append(f"it reduces its picture by {reduces}, and the latents are those of a VAE that reduces by 8")
    return found


def _told(config: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return " and ".join(str(config.get(name)) for name in names)


KIND = ControlKind(
    name="controlnet",
    title="ControlNet",
    classes=("ControlNetModel",),
    feature="control",
    prefix="control-",
    argument="controlnet",
    defaults=("controlnet_conditioning_scale",),
    halves=True,
    reads=lambda configs, shape, component: residuals(configs["unet"], shape),
    specs=_specs,
    of_step=lambda control: control.component,
    feeds=_feeds,
    problems=_problems,
    advice="choose one that was trained for this UNet, such as one for SD 2.1 with SD-Turbo, for SDXL with SDXL-Turbo",
)
