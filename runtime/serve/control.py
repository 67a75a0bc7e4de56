"""A picture that steers what is drawn, through a ControlNet or a T2I-Adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.inputs import canny, control
from turbochain.runtime.inputs.pictures import pixels

if TYPE_CHECKING:
    from PIL import Image


def nets(bundle: Bundle, task: str | None = None) -> list[str]:
    """Return the names of the ControlNets and T2I-Adapters that a task's calls, or any calls, can use."""
    chains = bundle.manifest.chains.items()
    found = [bundle.open_chain(name) for name, chain in chains if task in (None, chain.task)]
    return list(dict.fromkeys(net.name for chain in found for net in control.nets(chain)))


@dataclass(frozen=True)
class Control:
    """What a client wants of it; None: diffusers' default."""

    image: "Image.Image"
    net: str | None = None  # the name of either kind; None if there is one alone
    scale: float | None = None
    start: float | None = None
    end: float | None = None
    canny: tuple[float, float] | None = None  # the thresholds, if the picture's edges are wanted, and not itself

    def arguments(self, chain: OpenChain) -> Mapping[str, Any]:
        """Return the arguments of a call for a chain. Raises InputError.

        Edges are found when the picture has the size that is drawn: they would not survive resizing.
        """
        image: Any = self.image
        if self.canny is not None:
            image = canny(pixels("control_image", image, chain.size)[0], *self.canny)
        found = control.nets(chain)
        kind = control.CONTROLNET
        if self.net is not None:
            kind = control.find(chain, self.net).kind
        elif len(found) == 1:
            kind = found[0].kind
        return {
            "control_image": image,
            kind.argument: self.net,
            kind.scale: self.scale,
            "control_guidance_start": self.start,
            "control_guidance_end": self.end,
        }
