"""What a client wants, as a request that a bundle can carry out: sizes and seeds, strictly or leniently."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.choice import task_of
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.guidance import GUIDANCE, check_scale, embeds_guidance
from turbochain.runtime.inputs.rows import least_strength
from turbochain.runtime.request import Request
from turbochain.runtime.serve.control import Control

if TYPE_CHECKING:
    from PIL import Image

SEEDS = 1 << 64
MOST_PICTURES = 10
"""How many one request may ask for."""


@dataclass(frozen=True)
class Wanted:
    """A picture as a client asks for it; a field is None if the server may choose."""

    prompt: str
    negative_prompt: str | None = None
    image: "Image.Image | None" = None
    mask_image: "Image.Image | None" = None  # as in diffusers: white is repainted
    size: tuple[int, int] | None = None  # height, width in pixels
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    control: Control | None = None

    @property
    def task(self) -> str:
        """Return the task of these arguments."""
        return task_of(self.image, self.mask_image)


def request(bundle: Bundle, wanted: Wanted, seed: int, *, strict_size: bool = False) -> Request:
    """Return the request of one picture. Raises InputError for what the bundle cannot do.

    Another size than a built one is drawn at the nearest, unless `strict_size`.
    """
    sizes = bundle.sizes(wanted.task)
    size = wanted.size if strict_size and wanted.size else nearest(sizes, wanted.size)
    chain = bundle.open_chain(bundle.find_chain(wanted.task, size, 1))
    return Request.make(
        chain,
        wanted.prompt,
        image=wanted.image,
        mask_image=wanted.mask_image,
        strength=wanted.strength,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        negative_prompt=wanted.negative_prompt,
        seed=[seed],
        output_type="uint8",
        **({} if wanted.control is None else wanted.control.arguments(chain)),
    )


def requests(bundle: Bundle, wanted: Wanted, seeds: Sequence[int], *, strict_size: bool = False) -> list[Request]:
    """Return the request of each seed's picture; what they share is made once: resizing a picture takes its time.

    Raises InputError for what the bundle cannot do.
    """
    made = request(bundle, wanted, seeds[0], strict_size=strict_size)
    return [replace(made, seeds=(seed,)) for seed in seeds]


def seeds(seed: int | None, count: int) -> list[int]:
    """Return a seed for each of `count` pictures: `seed + i` modulo 2⁶⁴, or from one that is drawn."""
    first = secrets.randbits(32) if seed is None else seed
    return [(first + i) % SEEDS for i in range(count)]


def nearest(sizes: list[tuple[int, int]], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the built size (height, width) that is nearest; the first if none is asked.

    The shape counts four times as much as the area, each as a ratio: else a portrait would become a landscape.
    """
    if size is None:
        return sizes[0]
    height, width = size

    def apart(built: tuple[int, int]) -> float:
        tall, wide = math.log(built[0] / height), math.log(built[1] / width)
        return 4 * abs(tall - wide) + abs(tall + wide)

    return min(sizes, key=apart)


def edited(bundle: Bundle, wanted: Wanted) -> Wanted:
    """Return an edit with its default strength: the least that makes a step.

    Without a step count that of the fewest steps, of which there are two or more, so that the picture is not lost.
    """
    if wanted.strength is not None or wanted.image is None:
        return wanted
    chain = bundle.open_chain(bundle.find_chain(wanted.task, bundle.sizes(wanted.task)[0], 1))
    fixed = sorted({t.strength for t in chain.chain.tables.values() if t.strength is not None})
    if fixed:
        return replace(wanted, strength=fixed[0])
    steps = wanted.num_inference_steps
    if steps is None:
        steps = next((n for n in chain.steps if n > 1), chain.steps[0])
    return replace(wanted, num_inference_steps=steps, strength=least_strength(steps))


def as_built(bundle: Bundle, wanted: Wanted) -> Wanted:
    """Return what a bundle can do of a wish: for clients that send the values of other models whatever they are told.

    The most steps that are built and not above those asked for, else the fewest; a strength that makes at least one
    step; guidance and a negative prompt if the model was built to be drawn with them.
    """
    chain = bundle.open_chain(bundle.find_chain(wanted.task, nearest(bundle.sizes(wanted.task), wanted.size), 1))
    tables = chain.chain.tables.values()
    asked = math.inf if wanted.num_inference_steps is None else wanted.num_inference_steps
    steps = max((n for n in chain.steps if n <= asked), default=chain.steps[0])
    scale = wanted.guidance_scale
    if embeds_guidance(chain):
        scale = _closest(scale, [t.guidance_scale for t in tables if t.guidance_scale is not None])
    elif GUIDANCE not in chain.chain.modes or chain.chain.defaults.get("guidance_scale", 0.0) <= 1:
        scale = None
    guided = (check_scale(chain, scale) > 1) and GUIDANCE in chain.chain.modes
    strength = wanted.strength
    if wanted.image is None:
        strength = None
    elif fixed := [t.strength for t in tables if t.strength is not None]:
        strength = _closest(strength, fixed)
    elif strength is not None:
        strength = min(max(strength, least_strength(steps)), 1.0)
    negative = (wanted.negative_prompt or None) if guided else None
    return replace(wanted, num_inference_steps=steps, guidance_scale=scale, strength=strength, negative_prompt=negative)


def _closest(value: float | None, built: list[float]) -> float | None:
    return None if value is None else min(built, key=lambda other: abs(other - value))


def parse_size(text: str) -> tuple[int, int] | None:
    """Return height and width of WIDTHxHEIGHT; None for "auto" or nothing. Raises InputError."""
    if text in ("", "auto"):
        return None
    width, cross, height = text.partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InputError(f"size={text!r}: WIDTHxHEIGHT in pixels was expected, such as 512x512, or auto")
    if max(len(width), len(height)) > 5 or not (1 <= int(width) <= 1 << 16 and 1 <= int(height) <= 1 << 16):
        raise InputError(f"size={text!r}: sides from 1 to {1 << 16} pixels were expected")
    return int(height), int(width)
