"""T2I-Adapter: a small network that makes features from a picture; the UNet adds them in every step. Torch-free."""

from collections.abc import Mapping
from typing import Any

from turbochain.export.controls.kind import Configs, Control, ControlKind, levels, picture
from turbochain.export.families import Family, GraphSpec, Inputs, Shape
from turbochain.runtime.bundle.manifest import Feed

STATE, FEATURE, SCALE = "t2i_state_", "t2i_feature_", "adapter_conditioning_scale"
"""What the adapter makes, what the UNet reads (that times the scale), and the scale."""

_DEFAULTS: dict[str, Any] = {"in_channels": 3, "downscale_factor": 8, "adapter_type": "full_adapter"}
TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")

Sizes = list[tuple[int, tuple[int, int]]]


def features(config: Mapping[str, Any], shape: Shape) -> Sizes:
    """Return the width and the size of every feature that an adapter makes."""
    config = _DEFAULTS | {**config}
    factor, channels = config["downscale_factor"], list(config["channels"])
    size = (shape.height // factor, shape.width // factor)
    halved = [True] * len(channels)
    if config["adapter_type"] == "full_adapter_xl":
        halved = [i == 2 for i in range(len(channels))]
    if config["adapter_type"] == "light_adapter":
        channels, halved = [*channels, channels[-1]], [True, *halved]
    found: Sizes = []
    for width, half in zip(channels, [False, *halved[1:]], strict=True):
        size = (-(-size[0] // 2), -(-size[1] // 2)) if half else size
        found.append((width, size))
    return found


def _wanted(unet: Mapping[str, Any], shape: Shape) -> Sizes:
    """Return the width and the size of what a UNet adds features to: what each down block makes, and the middle.

    Blocks with attention add one before they halve the size, the others afterwards.
    """
    of_levels = levels(unet, shape)
    found = [
        (channels, size if "CrossAttn" in block or after is None else after[1])
        for (channels, size), after, block in zip(
            of_levels, [*of_levels[1:], None], unet["down_block_types"], strict=True
        )
    ]
    return [*found, of_levels[-1]]


def _tensors(prefix: str, sizes: Sizes, shape: Shape) -> Inputs:
    named = {f"{prefix}{i}": tensor for i, tensor in enumerate(sizes)}
    return {name: ("float32", (shape.batch, channels, *size)) for name, (channels, size) in named.items()}


def _specs(family: Family, configs: Configs, control: Control) -> dict[str, GraphSpec]:
    config = _DEFAULTS | {**configs[control.component]}
    count = len(features(config, Shape(64, 64, 1)))
    states = tuple(f"{STATE}{i}" for i in range(count))
    adapter = GraphSpec(
        role="t2i_adapter",
        component=control.component,
        module="T2IAdapter",
        inputs=lambda configs, shape: picture(config["in_channels"], shape),
        outputs=states,
    )
    scaled = GraphSpec(
        role="t2i_scale",
        component="",
        module="T2IScale",
        inputs=lambda configs, shape: {
            **_tensors(STATE, features(config, shape), shape),
            SCALE: ("float32", (1,)),
        },
        outputs=tuple(f"{FEATURE}{i}" for i in range(count)),
        precision="fp32",
    )
    return {control.component: adapter, "t2i_scale": scaled}


def _feeds(family: Family, configs: Configs, control: Control) -> dict[str, Feed]:
    (name,) = picture((_DEFAULTS | {**configs[control.component]})["in_channels"], Shape(8, 8, 1))
    return {name: Feed("image", "call"), SCALE: Feed("number", "step")}


def _problems(configs: Configs, component: str, shape: Shape) -> list[str]:
    config = _DEFAULTS | {**configs[component]}
    if (kind := config["adapter_type"]) not in TYPES:
        return [f"its adapter_type is {kind!r}, supported are {', '.join(TYPES)}"]
    if config["in_channels"] not in (1, 3):
        return [f"it reads {config['in_channels']} channels, supported are 1 (grey) and 3 (RGB)"]
    if shape.height % (factor := config["downscale_factor"]) or shape.width % factor:
        return [
            f"it reads pictures whose sides are multiples of {factor}, and {shape.width}x{shape.height} is asked for"
        ]
    made, wanted = features(config, shape), _wanted(configs["unet"], shape)
    first = next(c for c in configs if c.startswith(f"{KIND.name}-"))
    if len(made) != len(features(configs[first], shape)):
        return [f"it makes {len(made)} features, and the other adapter {len(features(configs[first], shape))}"]
    if made != wanted[: len(made)]:
        return [f"its features are {_told(made)}, and the UNet adds {_told(wanted[: len(made)])}"]
    return []


def _told(sizes: Sizes) -> str:
    return ", ".join(f"{channels}x{height}x{width}" for channels, (height, width) in sizes)


KIND = ControlKind(
    name="t2i_adapter",
    title="T2I-Adapter",
    classes=("T2IAdapter",),
    feature="t2i",
    prefix="t2i-",
    argument="adapter",
    defaults=(SCALE, "adapter_conditioning_factor"),
    halves=False,
    reads=lambda configs, shape, component: _tensors(FEATURE, features(configs[component], shape), shape),
    specs=_specs,
    of_step=lambda control: "t2i_scale",
    feeds=_feeds,
    problems=_problems,
    advice="choose one that was trained for this UNet, such as TencentARC's for SDXL",
)
