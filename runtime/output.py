"""What a call returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns."""

    images: Any
    # list of PIL images; or [N, H, W, 3] uint8 ("uint8") or fp32 in [0, 1] ("np"); or [N, 4, H/8, W/8] fp32 ("latent")
    seed: int | list[int]  # the one that was used, also if the caller gave none
    seconds: float  # the whole call
    device_seconds: float  # how long the device worked; the rest of the call's time is the host's
    uncaptured: str | None  # on a GPU, why the chain did not run as one CUDA graph; None if it did, and on a CPU
    resized: tuple[int, int] | None = None  # height, width of the first image, if another size was drawn
    adapters: tuple[tuple[str, float], ...] = ()  # the active LoRAs, with their weights


def as_images(output_type: str, made: np.ndarray) -> Any:
    """Return pictures [N, H, W, 3] uint8 as an output type; latents are as they are."""
    if output_type in ("uint8", "latent"):
        return made
    if output_type == "np":
        return made.astype(np.float32) / 255
    from PIL import Image

    return [Image.fromarray(picture) for picture in made]


def problem(made: np.ndarray, finite: bool, output_type: str) -> str | None:
    """Return what is wrong with a batch, as a phrase, or None if it is a picture; `finite`: whether the latents are."""
    if not finite:
        return "NaN or infinite latents"
    if output_type != "latent" and any(_is_uniform(picture) for picture in made):
        return "a picture of one single value"
    return None


def _is_uniform(picture: np.ndarray) -> bool:
    value = picture[0, 0, 0]
    return bool((picture[0] == value).all() and (picture == value).all())  # the first row says no in microseconds
