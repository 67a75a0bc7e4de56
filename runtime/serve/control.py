"""A picture that steers what is drawn, through a ControlNet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.inputs import canny
from turbochain.runtime.inputs.pictures import pixels

if TYPE_CHECKING:
    from PIL import Image


def nets(bundle: Bundle, task: str | None = None) -> list[str]:
    """Return the names of the ControlNets that calls of a task, or of any, can use."""
    manifest = bundle.manifest
    stages = [stage for chain in manifest.chains.values() if task in (None, chain.task) for stage in chain.stages]
    graphs = [manifest.graphs[stage.graph] for stage in stages]
    found = [graph.component.removeprefix("controlnet-") for graph in graphs if graph.role == "controlnet_embedding"]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Control:
    """What a client wants of a ControlNet; the names mean as in `Pipeline.__call__`."""

    image: "Image.Image"
    net: str | None = None  # None if there is one alone
    scale: float | None = None  # this and the next two: diffusers' defaults for None
    start: float | None = None
    end: float | None = None
    canny: tuple[float, float] | None = None  # the thresholds, if the picture's edges are wanted, and not itself

    def arguments(self, size: tuple[int, int]) -> Mapping[str, Any]:
        """Return the arguments of a call that draws `size` = (height, width). Raises InputError.

        Edges are found when the picture has the size that is drawn: they would not survive resizing.
        """
        image: Any = self.image
        if self.canny is not None:
            image = canny(pixels("control_image", image, size)[0], *self.canny)
        return {
            "control_image": image,
            "controlnet": self.net,
            "controlnet_conditioning_scale": self.scale,
            "control_guidance_start": self.start,
            "control_guidance_end": self.end,
        }
