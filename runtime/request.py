"""A call's arguments, checked once: what `Pipeline` draws, and what a server can queue."""

import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import control, pictures
from turbochain.runtime.inputs.arrays import Array
from turbochain.runtime.inputs.embeds import NEGATIVE, POOLED, check_embeds
from turbochain.runtime.inputs.generators import seeds_of
from turbochain.runtime.inputs.given import check_inputs, check_latents, given_feeds, picture_feeds, resized
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT, check_scale, modes_of
from turbochain.runtime.inputs.noise import check_seed
from turbochain.runtime.inputs.numbers import is_whole
from turbochain.runtime.inputs.others import check_others
from turbochain.runtime.inputs.rows import table_of
from turbochain.runtime.inputs.tokenizer import check_prompt

log = logging.getLogger("turbochain")

OUTPUT_TYPES = ("pil", "np", "uint8", "latent")


@dataclass(frozen=True)
class Request:
    """One call. `make` checks its arguments against a chain; equal requests give equal pictures."""

    chain: str
    table: str  # of the chain
    prompts: tuple[str, ...]  # one for each picture; () if their embeds are given
    seeds: tuple[int, ...]  # one for the whole call, or one for each picture
    one_generator: bool  # whether the first seed is that of the whole call
    latents: Array | None = None  # unit noise [N, 4, H/8, W/8] fp32 in place of what is drawn for them
    inputs: tuple[tuple[str, Array], ...] = ()  # the feeds that a caller gives, by name
    modes: frozenset[str] = frozenset()
    output_type: str = "pil"
    negative_prompts: tuple[str, ...] = ()  # one for each picture
    embeds: tuple[tuple[str, Array], ...] = ()  # what the text encoders would make, [N, …] by name; the prompt's first
    resized: tuple[int, int] | None = None  # height, width of the first image, if another size is drawn

    @property
    def count(self) -> int:
        """Return N, the number of pictures."""
        return len(self.prompts) if self.prompts else len(self.embeds[0][1].value)

    @property
    def decode(self) -> bool:
        """Return whether the latents are decoded."""
        return self.output_type != "latent"

    @property
    def seed(self) -> int | list[int]:
        """Return the seed as a caller would give it."""
        return self.seeds[0] if self.one_generator else list(self.seeds)

    @classmethod
    def make(
        cls,
        chain: OpenChain,
        prompt: str | Sequence[str] | None = None,
        *,
        image: object = None,
        mask_image: object = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: object = None,
        latents: np.ndarray | None = None,
        prompt_embeds: np.ndarray | None = None,
        pooled_prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        negative_pooled_prompt_embeds: np.ndarray | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
        modes: Collection[str] = (),
        output_type: str = "pil",
        **others: Any,
    ) -> "Request":
        """Return the request of a call; the arguments are those of `Pipeline.__call__`, `ControlOptions` among them.

        Raises InputError, and TypeError for a name that neither this package nor diffusers has.
        """
        image, steering = control.steering(chain, image, others)
        repeats = _check_repeats(num_images_per_prompt)
        embeds = check_embeds(chain, prompt_embeds, pooled_prompt_embeds, repeats)
        if embeds and prompt is not None:
            raise InputError("prompt and prompt_embeds were given: one of the two was expected")
        if not embeds and prompt is None:
            raise InputError("prompt is None: give a prompt, or its prompt_embeds")
        prompts = () if embeds else _check_prompts("prompt", prompt, repeats)
        count = len(embeds[0][1].value) if embeds else len(prompts)
        _check_size(chain, height, width)
        _check_output_type(chain, output_type)
        scale = check_scale(chain, guidance_scale)
        table = table_of(chain, num_inference_steps, strength, scale)
        given_negative = negative_prompt is not None or negative_prompt_embeds is not None
        on = modes_of(chain, scale, given_negative, modes) | steering.modes
        negative = (negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)
        negative_prompts, negative_embeds = _check_negative(chain, on, negative, others, count, repeats)
        given = dict(inputs or {}) | picture_feeds(chain, image, mask_image, inputs or {})
        given |= steering.feeds(chain, table, count // repeats, repeats)
        if GUIDANCE in on:
            given.setdefault("guidance_scale", np.array([scale], np.float32))
        seed = _check_generator(seed, generator)
        return cls(
            chain=chain.name,
            table=table,
            prompts=prompts,
            seeds=_check_seeds("seed" if generator is None else "generator", seed, count),
            one_generator=isinstance(seed, int | np.integer),
            latents=None if latents is None else check_latents(chain, latents, count),
            inputs=check_inputs(chain, on, given, count, chain.chain.tables[table].rows),
            modes=on,
            output_type=output_type,
            negative_prompts=negative_prompts,
            embeds=(*embeds, *negative_embeds),
            resized=resized(chain, steering.image if image is None else image),
        )

    @classmethod
    def sample(
        cls,
        chain: OpenChain,
        num_inference_steps: int | None = None,
        prompt: str = "",
        strength: float | None = None,
        controlnet: str | None = None,
    ) -> "Request":
        """Return a request for one batch with all that the chain takes, to measure it or to warm it up: grey images,
        masks of ones, zeros of anything else. `controlnet`: the ControlNet or T2I-Adapter that it uses. Raises what
        `make` raises."""
        scale = check_scale(chain, None)
        modes = modes_of(chain, scale, False, [] if controlnet is None else [control.find(chain, controlnet).mode])
        rows = chain.chain.tables[table_of(chain, num_inference_steps, strength, scale)].rows
        inputs, fill = {}, {"image": 128, "mask": 1, "number": scale}
        for name, feed in given_feeds(chain, modes).items():
            shape, dtype = chain.tensors[name].shape, chain.tensors[name].dtype
            value = 1 if controlnet is not None and name in control.NUMBERS else fill.get(feed.is_, 0)
            inputs[name] = np.full((rows, *shape) if feed.when == "step" else shape, value, dtype)
        return cls.make(
            chain,
            [prompt] * chain.batch,
            num_inference_steps=num_inference_steps,
            strength=strength,
            seed=0,
            inputs=inputs,
            modes=modes,
            output_type="uint8",
        )


def _check_repeats(repeats: object) -> int:
    if not is_whole(repeats) or repeats < 1:
        raise InputError(f"num_images_per_prompt={repeats!r}: a whole number of at least 1 was expected")
    return int(repeats)


def _check_prompts(argument: str, prompt: object, repeats: int) -> tuple[str, ...]:
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, list | tuple) else list(prompt)
    if not prompts:
        raise InputError(f"{argument}=[]: at least one prompt was expected")
    return tuple(check_prompt(p, argument=argument) for p in prompts for _ in range(repeats))


def _check_size(chain: OpenChain, height: int | None, width: int | None) -> None:
    size = chain.size
    given = pictures.side("height", height, size[0]), pictures.side("width", width, size[1])
    if given != size:
        raise InputError(
            f"height={given[0]}, width={given[1]}: the chain {chain.name} is built for {size[1]}x{size[0]}; leave out "
            "the chain or the size"
        )


def _check_output_type(chain: OpenChain, output_type: object) -> None:
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type={output_type!r}: choose from {', '.join(OUTPUT_TYPES)}")
    if output_type == "latent" and chain.latents is None:
        raise InputError(f"output_type='latent': the chain {chain.name} carries no latents; choose another")


def _check_negative(
    chain: OpenChain,
    modes: frozenset[str],
    negative: tuple[object, object, object],
    others: Mapping[str, object],
    count: int,
    repeats: int,
) -> tuple[tuple[str, ...], tuple[tuple[str, Array], ...]]:
    """Return the negative prompt of each picture, () if the call reads none, and the embeds that stand for it.

    `negative`: the prompt, of which one for all is repeated, and its embeds, whole and pooled. `others`: the further
    arguments of diffusers' call; one warning names all that have no effect without guidance.
    """
    idle = check_others(chain, others, negative=GUIDANCE in modes)
    if GUIDANCE not in modes:
        names = (NEGATIVE_PROMPT, f"{NEGATIVE}prompt_embeds", NEGATIVE + POOLED)
        if idle := [*(n for n, value in zip(names, negative, strict=True) if value is not None), *idle]:
            log.warning("%s: without guidance this has no effect, as in diffusers", ", ".join(idle))
        return (), ()
    negative_prompt, whole, pooled = negative
    if embeds := check_embeds(chain, whole, pooled, repeats, NEGATIVE):
        if negative_prompt is not None:
            raise InputError("negative_prompt and negative_prompt_embeds were given: one of the two was expected")
        if (given_count := len(embeds[0][1].value)) != count:
            raise InputError(
                f"negative_prompt_embeds are of {given_count // repeats}: one for each of {count // repeats} prompts "
                "was expected"
            )
        return (), embeds
    if not any(feed.of == NEGATIVE_PROMPT for feed in chain.read(modes).values()):
        return (), ()
    given = _check_prompts(NEGATIVE_PROMPT, "" if negative_prompt is None else negative_prompt, repeats)
    given = given * (count // repeats) if len(given) == repeats else given
    if len(given) != count:
        raise InputError(
            f"negative_prompt is a list of {len(given) // repeats}: one, or one for each of {count // repeats} "
            "prompts was expected"
        )
    return given, ()


def _check_generator(seed: Any, generator: object) -> Any:
    """Return the seed, the generator's, or one that is drawn."""
    if generator is None:
        return secrets.randbits(64) if seed is None else seed
    if seed is not None:
        raise InputError("seed and generator were given: one of the two was expected")
    return seeds_of(generator)


def _check_seeds(argument: str, seed: object, count: int) -> tuple[int, ...]:
    seeds = [seed] if isinstance(seed, int | np.integer) else seed
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or (seeds is seed and len(seeds) != count):
        raise InputError(f"{argument}={seed!r}: an integer, or a list with one integer for each of {count} pictures")
    return tuple(check_seed(s) for s in seeds)
