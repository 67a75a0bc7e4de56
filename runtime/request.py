"""A call's arguments, checked once: what `Pipeline` draws, and what a server can queue."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.noise import check_seed
from turbochain.runtime.inputs.tokenizer import check_prompt

OUTPUT_TYPES = ("pil", "np", "uint8")
GIVEN = ("embeds", "image", "mask", "number")
"""The kinds of feeds that a caller gives as arrays."""


@dataclass(frozen=True, eq=False)
class Array:
    """An array that is compared and hashed by its values, so that a request can be."""

    value: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.value.dtype.str, self.value.shape, self.value.tobytes()


@dataclass(frozen=True)
class Request:
    """One call. `make` checks its arguments against a chain; equal requests give equal pictures."""

    prompts: tuple[str, ...]  # one for each picture
    steps: int
    seeds: tuple[int, ...]  # one for the whole call, or one for each picture
    one_generator: bool  # whether the first seed is that of the whole call
    chain: str = TEXT_TO_IMAGE
    latents: Array | None = None  # unit noise [N, 4, H/8, W/8] fp32 instead of the first draw
    inputs: tuple[tuple[str, Array], ...] = ()  # the feeds that a caller gives, by name
    modes: frozenset[str] = frozenset()
    output_type: str = "pil"

    @property
    def seed(self) -> int | list[int]:
        """Return the seed as a caller would give it."""
        return self.seeds[0] if self.one_generator else list(self.seeds)

    @classmethod
    def make(
        cls,
        chain: OpenChain,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 0.0,
        negative_prompt: object = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: np.ndarray | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
        output_type: str = "pil",
    ) -> "Request":
        """Return the request of a call; the arguments are those of `Pipeline.__call__`. Raises InputError."""
        prompts = _check_prompts(prompt, num_images_per_prompt)
        _check_size(chain, height, width)
        _check_guidance(guidance_scale, negative_prompt)
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}: choose from {', '.join(OUTPUT_TYPES)}")
        steps = chain.steps[0] if num_inference_steps is None else num_inference_steps
        chain.entry(steps)
        seed = secrets.randbits(64) if seed is None else seed
        one = isinstance(seed, int | np.integer)
        return cls(
            prompts=tuple(prompts),
            steps=int(steps),
            seeds=_check_seeds(seed, len(prompts)),
            one_generator=one,
            chain=chain.name,
            latents=None if latents is None else _check_latents(chain, latents, len(prompts)),
            inputs=_check_inputs(chain, inputs or {}, len(prompts)),
            output_type=output_type,
        )


def _check_prompts(prompt: object, repeats: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, list | tuple) else list(prompt)
    if not prompts:
        raise InputError("prompt=[]: at least one prompt was expected")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"num_images_per_prompt={repeats!r}: a whole number of at least 1 was expected")
    return [check_prompt(p) for p in prompts for _ in range(repeats)]


def _check_size(chain: OpenChain, height: int | None, width: int | None) -> None:
    size = chain.size
    if (size[0] if height is None else height, size[1] if width is None else width) != size:
        raise InputError(
            f"height={height}, width={width}: this bundle is built for {size[1]}x{size[0]}; "
            f"build another with build-engine SOURCE --size {width or size[1]}x{height or size[0]}"
        )


def _check_guidance(guidance_scale: object, negative_prompt: object) -> None:
    try:
        guided = math.isnan(guidance_scale) or guidance_scale > 1  # type: ignore[arg-type, operator]
    except TypeError:
        guided = True
    if guided:
        raise InputError(f"guidance_scale={guidance_scale!r}: Turbo models have no guidance; leave it out or give 0.0")
    if negative_prompt is not None:
        raise InputError("negative_prompt was given: Turbo models have none, because they work without guidance")


def _check_seeds(seed: object, count: int) -> tuple[int, ...]:
    seeds = [seed] if isinstance(seed, int | np.integer) else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or (seeds is seed and len(seeds) != count):
        raise InputError(f"seed={seed!r}: an integer, or a list with one integer for each of {count} pictures")
    return tuple(check_seed(s) for s in seeds)


def _check_latents(chain: OpenChain, latents: object, count: int) -> Array:
    name = next((d.name for d in chain.chain.draws if d.name in chain.feeds("noise")), None)
    if name is None:
        raise InputError(f"latents was given, and the chain {chain.name} draws none")
    return _check_array("latents", latents, "float32", (count, *chain.tensors[name].shape[1:]))


def _check_inputs(chain: OpenChain, given: Mapping[str, object], count: int) -> tuple[tuple[str, Array], ...]:
    wanted = {name: feed.is_ for name, feed in chain.chain.feeds.items() if feed.is_ in GIVEN and feed.when != "held"}
    if wanted.keys() != given.keys():
        raise InputError(
            f"inputs: the chain {chain.name} takes {', '.join(wanted) or 'none'}; given: {', '.join(given) or 'none'}"
        )
    found = []
    for name, kind in wanted.items():
        tensor = chain.tensors[name]
        shape = tensor.shape if kind == "number" else (count, *tensor.shape[1:])
        found.append((name, _check_array(f"inputs[{name!r}]", given[name], tensor.dtype, shape)))
    return tuple(found)


def _check_array(argument: str, value: object, dtype: str, shape: tuple[int, ...]) -> Array:
    expected = f"an array of {dtype} {list(shape)} was expected"
    if not isinstance(value, np.ndarray):
        raise InputError(f"{argument} is of type {type(value).__name__}: {expected}")
    if value.dtype != dtype or value.shape != shape:
        raise InputError(f"{argument} is {value.dtype} {list(value.shape)}: {expected}")
    if not np.isfinite(value).all():
        raise InputError(f"{argument} holds NaN or infinite values")
    kept = value.copy()  # the caller may change its own while the request waits
    kept.setflags(write=False)
    return Array(kept)
