"""What is called: a task, its guidance and its strength. Imported by the peers' processes: standard library alone."""

from dataclasses import asdict, dataclass
from typing import Any

TEXT_TO_IMAGE = "text-to-image"


@dataclass(frozen=True)
class Workload:
    """The arguments of a call besides prompt, seed and steps."""

    task: str = TEXT_TO_IMAGE  # or image-to-image
    guidance_scale: float = 0.0
    strength: float | None = None  # of image-to-image

    @property
    def plain(self) -> bool:
        """Return whether it is text-to-image without guidance."""
        return self == Workload()

    @property
    def text(self) -> str:
        """Return it as a phrase; "" if it is plain."""
        guided = f"guidance {self.guidance_scale:g}" if self.guidance_scale else ""
        task = self.task if self.task != TEXT_TO_IMAGE else ""
        return ", ".join(filter(None, (task, f"strength {self.strength:g}" if self.strength else "", guided)))

    @property
    def spec(self) -> dict[str, Any]:
        """Return plain values for a contender's process."""
        return asdict(self)


PLAIN = Workload()


def arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call, ours or diffusers', of a spec with `Workload.spec` and the size."""
    of = spec.get("workload") or PLAIN.spec
    found = {"guidance_scale": of["guidance_scale"]}
    if of["task"] != TEXT_TO_IMAGE:
        found |= {"image": picture(*spec["size"]), "strength": of["strength"]}
    return found


def picture(width: int, height: int) -> Any:
    """Return the picture that image-to-image starts from, of this size in pixels: areas, edges, fine waves."""
    import numpy
    from PIL import Image

    y, x = numpy.mgrid[0:height, 0:width] / max(height, width)
    waves = [numpy.sin(a * x + b * y) for a, b in ((9, 4), (-5, 11), (60, 45))]
    waves[0][(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05] *= -1
    return Image.fromarray(numpy.round(127.5 + 100 * numpy.stack(waves, axis=-1)).astype(numpy.uint8))
