"""Fields that the bodies of several routes have."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Lora(BaseModel):
    """An adapter as a request names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    scale: Annotated[float, Field(strict=True)] = 1.0  # strict: true and false are no numbers


def pairs(loras: Iterable[Lora] | None) -> list[tuple[str, float]]:
    """Return the names and scales."""
    return [(lora.name, lora.scale) for lora in loras or ()]
