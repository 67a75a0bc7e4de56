"""What networks that steer a UNet with a picture have in common. Torch-free."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turbochain.export.families import Family, GraphSpec, Inputs, Shape
from turbochain.runtime.bundle.manifest import Feed

Configs = Mapping[str, Any]
"""Component → config."""


@dataclass(frozen=True)
class ControlKind:
    """One kind: what its graphs are, and what the UNet reads of them."""

    name: str  # the option, and the key of `Family.steered`
    title: str  # for people
    classes: tuple[str, ...]  # of diffusers, that its config.json may name
    feature: str  # of the UNets that read what it makes
    prefix: str  # what its modes begin with
    argument: str  # of the constructors of diffusers' pipelines
    defaults: tuple[str, ...]  # arguments of their calls whose defaults a chain keeps
    halves: bool  # whether the negative half of guidance has tensors of its own
    reads: Callable[[Configs, Shape, str], Inputs]  # (configs, shape, the first one's component) → what the UNet reads
    specs: Callable[[Family, Configs, "Control"], Mapping[str, GraphSpec]]
    # graph → specification; those of "image" first, which read a picture alone
    of_step: Callable[["Control"], str]  # → the one of these that runs in each step
    feeds: Callable[[Family, Configs, "Control"], Mapping[str, Feed]]
    problems: Callable[[Configs, str, Shape], list[str]]  # (configs, component, shape) → what does not fit, as phrases
    advice: str  # how to mend that


@dataclass(frozen=True)
class Control:
    """One network of a kind, under the name that calls have for it."""

    kind: ControlKind
    name: str

    @property
    def component(self) -> str:
        """Return the checkpoint's component that it is."""
        return f"{self.kind.name}-{self.name}"

    @property
    def mode(self) -> str:
        """Return the mode of calls that use it."""
        return self.kind.prefix + self.name

    @property
    def option(self) -> str:
        """Return the option that named it, for messages."""
        return f"--{self.kind.name.replace('_', '-')} {self.name}"


def levels(unet: Mapping[str, Any], shape: Shape) -> list[tuple[int, tuple[int, int]]]:
    """Return the width and the size of a UNet's latents at each of its levels, before they are halved."""
    size, found = (shape.height // 8, shape.width // 8), []
    for channels in unet["block_out_channels"]:
        found.append((channels, size))
        size = (-(-size[0] // 2), -(-size[1] // 2))
    return found


def picture(channels: int, shape: Shape) -> Inputs:
    """Return the control image [B, H, W, 3] uint8; a grey one has its own name and one channel."""
    name = "control_image" if channels == 3 else "grey_control_image"
    return {name: ("uint8", (shape.batch, shape.height, shape.width, channels))}
