"""Fields that the bodies of several routes have."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from turbochain.runtime.serve.control import Control

if TYPE_CHECKING:
    from PIL import Image


def _number(value: object) -> object:
    """Refuse true and false, which are numbers to Python, and would be the seeds 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number was expected, and not {value}", {"value": str(value).lower()})
    return value


def _of_form(value: object) -> object:
    """Return what JSON says that is the text of a form's field."""
    return from_json(value) if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]


class Lora(BaseModel):
    """An adapter as a request names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    scale: Real = 1.0


Loras = Annotated[list[Lora], BeforeValidator(_of_form)]


def pairs(loras: Iterable[Lora] | None) -> list[tuple[str, float]]:
    """Return the names and scales."""
    return [(lora.name, lora.scale) for lora in loras or ()]


class ControlFields(BaseModel):
    """What goes with a control image."""

    controlnet: str | None = None
    controlnet_conditioning_scale: Real | None = None
    control_guidance_start: Real | None = None
    control_guidance_end: Real | None = None
    canny: Annotated[list[Real], BeforeValidator(_of_form), Field(min_length=2, max_length=2)] | None = None

    def control(self, image: "Image.Image | None") -> Control | None:
        """Return what is wanted with a control image; without one these fields have no effect."""
        if image is None:
            return None
        return Control(
            image,
            self.controlnet,
            self.controlnet_conditioning_scale,
            self.control_guidance_start,
            self.control_guidance_end,
            None if self.canny is None else (self.canny[0], self.canny[1]),
        )
