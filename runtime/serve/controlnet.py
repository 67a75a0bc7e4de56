"""The ControlNet of A1111's API: one unit of `alwayson_scripts`, as its clients send it."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from turbochain.runtime.errors import InputError
from turbochain.runtime.serve.control import Control
from turbochain.runtime.serve.encoding import decode_base64
from turbochain.runtime.serve.errors import Refused

if TYPE_CHECKING:
    from PIL import Image

CANNY = (100.0, 200.0)
"""The thresholds of A1111, if a client sends none, or numbers below 0."""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Switch(BaseModel):
    """Whether a unit is on, in the words that A1111 takes. If it is off, nothing else of it is read."""

    enabled: bool = True


class Unit(BaseModel):
    """What is read of a unit; other fields (resize_mode, processor_res, pixel_perfect, …) have no effect."""

    model_config = ConfigDict(allow_inf_nan=False)

    image: str | dict[str, Any] | None = None  # base64, or an object in which `image` is
    input_image: str | None = None  # its older name
    module: Annotated[Literal["none", "canny"], BeforeValidator(_lower)] = "none"  # the preprocessor
    model: str = "None"  # a name, which may end in [a hash]
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    threshold_a: float = -1
    threshold_b: float = -1

    @property
    def net(self) -> str | None:
        """Return the name of the ControlNet, None for the only one."""
        return None if self.model == "None" else re.sub(r" \[\w+\]$", "", self.model)

    @property
    def canny(self) -> tuple[float, float] | None:
        """Return the thresholds, if edges are wanted."""
        given = (self.threshold_a, self.threshold_b)
        low, high = (default if value < 0 else value for value, default in zip(given, CANNY, strict=True))
        return None if self.module == "none" else (low, high)

    def control(self, started_from: "Image.Image | None") -> Control:
        """Return what is wanted; without a picture of its own a unit takes what img2img starts from.

        Decodes. Raises InputError.
        """
        sent = self.image.get("image") if isinstance(self.image, dict) else self.image or self.input_image
        image = decode_base64("control_image", sent) if isinstance(sent, str) else started_from
        if image is None:
            raise InputError("control_image: the ControlNet's unit has no image: one in base64 was expected")
        start, end = self.guidance_start or None, None if self.guidance_end == 1 else self.guidance_end
        return Control(image, self.net, self.weight, start, end, self.canny)  # a T2I-Adapter takes no start or end

    @property
    def told(self) -> str:
        """Return what `info` says of it, in A1111's words."""
        values = {
            "Module": self.module,
            "Model": self.net or "None",
            "Weight": self.weight,
            "Guidance Start": self.guidance_start,
            "Guidance End": self.guidance_end,
        }
        if self.canny is not None:
            values |= {"Threshold A": self.canny[0], "Threshold B": self.canny[1]}
        return ", ".join(f"{name}: {value}" for name, value in values.items())


def read_unit(scripts: Mapping[str, Any]) -> Unit | None:
    """Return the one unit that is on, None if there is none. Raises Refused."""
    script = next((value for name, value in scripts.items() if name.lower() == "controlnet"), None)
    sent = script.get("args", []) if isinstance(script, dict) else []
    try:
        given = [{n: v for n, v in one.items() if v is not None} for one in sent]
        on = [Unit.model_validate(one) for one in given if Switch.model_validate(one).enabled]
    except (AttributeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("args",), "msg": "not objects"}
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"alwayson_scripts.controlnet: {where}: {first['msg']}", param="alwayson_scripts") from None
    if len(on) > 1:
        raise Refused(400, f"{len(on)} ControlNets are on: at most one was expected", param="alwayson_scripts")
    return on[0] if on else None
