"""`Pipeline`: prompt in, pixels out, from a bundle and one of its engines."""

import logging
import math
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import selection
from turbochain.runtime.backends import Device
from turbochain.runtime.bundle.manifest import Schedule
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import Plan, plan
from turbochain.runtime.checks import verify
from turbochain.runtime.errors import InputError, PictureError, TurbochainError
from turbochain.runtime.inputs.cache import PromptCache
from turbochain.runtime.inputs.noise import Generator, draw_run
from turbochain.runtime.inputs.tokenizer import Tokenizer, check_prompt

log = logging.getLogger("turbochain")

OUTPUT_TYPES = ("pil", "np", "uint8")
PROMPT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns."""

    images: Any  # list of PIL images; or [N, H, W, 3] uint8 ("uint8") or fp32 in [0, 1] ("np")
    seed: int | list[int]  # what was used, also where the caller gave none


class Pipeline:
    """A loaded engine. Calls are safe from several threads; they take turns.

    Make one with `Pipeline.load`; it is a context manager that closes itself.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Any,
        *,
        engine_name: str = "",
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
    ) -> None:
        self.bundle = bundle
        self.observe: Callable[[str, float], None] | None = None
        """Called with a graph's name and the seconds of each launch of it, where set."""
        self.engine_name = engine_name
        self._executor = executor
        self._tokenizers = {
            name: Tokenizer(bundle.path / t.file, max_length=t.max_length, pad_token=t.pad_token, pad_id=t.pad_id)
            for name, t in bundle.manifest.tokenizers.items()
        }
        self._embeds = [t.name for g in bundle.chain.before for t in bundle.manifest.graphs[g].outputs]
        self._rows = {steps: selection.feeds(bundle, executor, steps) for steps in bundle.steps}
        for graph in bundle.chain.once:
            executor.unload(graph)
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self.prompt_cache = PromptCache(prompt_cache_bytes)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        backend: str | None = None,
        device: str | None = None,
        engine: str | None = None,
        threads: int | None = None,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
    ) -> "Pipeline":
        """Open a bundle's best engine for this machine, every file hashed first.

        `backend`, `device`: the best one of these. `engine`: the one of this folder name in `engines/`.
        `threads`: how many CPU threads one launch may use (None: the backend's own choice).
        `prompt_cache_bytes`: bound of the prompt embeddings that are kept. Raises BundleError where the
        bundle is damaged or has no engine that fits, BackendMissing where the backend is not installed,
        VerificationError where an engine that was built on another machine fails its checks on this one.
        """
        bundle = Bundle.open(path)
        name, chosen = selection.select(bundle, backend, device, engine)
        executor = verify.open_verified(bundle, name, chosen, device=device, threads=threads)
        try:
            return cls(bundle, executor, engine_name=name, prompt_cache_bytes=prompt_cache_bytes)
        except BaseException:
            executor.close()
            raise

    def __call__(
        self,
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
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Make pictures; arguments are named and mean as in diffusers, and N = prompts · num_images_per_prompt.

        `seed`: an int in 0 … 2⁶⁴−1 is one generator for the whole call, a list of N is one per picture, None
        draws one; the noise is that of `torch.Generator("cpu").manual_seed(seed)`. `latents`: unit noise
        [N, 4, H/8, W/8] fp32 in place of the first draw. `num_inference_steps`: one that the bundle has a
        table for (None: the fewest). `output_type`: "pil", "uint8", or "np" (the 8-bit levels divided by 255).
        Raises InputError for a bad argument, PictureError where the model makes no picture.
        """
        prompts = _check_prompts(prompt, num_images_per_prompt)
        self._check_fixed(height, width, guidance_scale, negative_prompt, output_type)
        steps = self.bundle.steps[0] if num_inference_steps is None else num_inference_steps
        schedule = self.bundle.schedule(steps)
        seed = secrets.randbits(64) if seed is None else seed
        start, noise = self._draw(schedule, len(prompts), seed, latents)
        ids = {name: tokenizer.encode(prompts) for name, tokenizer in self._tokenizers.items()}
        self._warn_of_truncation(prompts)
        batch, pictures = self.bundle.batch, []
        for first in range(0, len(prompts), batch):
            rows = [min(i, len(prompts) - 1) for i in range(first, first + batch)]  # short: the last one again
            picture = self._run(steps, {k: v[rows] for k, v in ids.items()}, start[rows], noise[:, rows])
            pictures.append(picture[: len(prompts) - first])
        return PipelineOutput(
            _as(output_type, pictures[0] if len(pictures) == 1 else np.concatenate(pictures)),
            int(seed) if isinstance(seed, int | np.integer) else list(seed),
        )

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self._opened().device

    @property
    def busy_seconds(self) -> float:
        """How long the device worked on the last pass of the chain; the rest of a call's time is the host's."""
        return self._opened().seconds

    @property
    def uncaptured(self) -> str | None:
        """On a GPU, why the chain does not run as one CUDA graph; None where it does, and on a CPU."""
        return getattr(self._opened(), "uncaptured", None)

    def _opened(self) -> Any:
        if self._executor is None:
            raise TurbochainError("the pipeline is closed; load it again")
        return self._executor

    def warmup(self, num_inference_steps: int | None = None) -> None:
        """Make a picture and throw it away, so that the next call meets no first-time cost.

        On a GPU a second one: with the prompt known, the chain is another CUDA graph.
        """
        for _ in range(2 if self.device.kind == "cuda" else 1):
            self("", num_inference_steps=num_inference_steps, seed=0, output_type="uint8")

    def close(self) -> None:
        """Give back the engine's memory; a later call raises TurbochainError."""
        with self._lock:
            if self._executor is not None:
                self._executor.close()
                self._executor = None
            self.prompt_cache.clear()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_fixed(
        self,
        height: int | None,
        width: int | None,
        guidance_scale: float,
        negative_prompt: object,
        output_type: str,
    ) -> None:
        size = self.bundle.size
        if (size[0] if height is None else height, size[1] if width is None else width) != size:
            raise InputError(
                f"height={height}, width={width}: this bundle is built for {size[1]}x{size[0]}; "
                f"build another with build-engine SOURCE --size {width or size[1]}x{height or size[0]}"
            )
        try:
            guided = math.isnan(guidance_scale) or guidance_scale > 1
        except TypeError:
            guided = True
        if guided:
            raise InputError(
                f"guidance_scale={guidance_scale!r}: Turbo models have no guidance; leave it out or give 0.0"
            )
        if negative_prompt is not None:
            raise InputError("negative_prompt was given: Turbo models have none, because they work without guidance")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}: choose from {', '.join(OUTPUT_TYPES)}")

    def _draw(self, schedule: Schedule, count: int, seed: object, latents: object) -> tuple[np.ndarray, np.ndarray]:
        """Scaled initial latents [N, …] and the noise of every step [S, N, …], drawn in diffusers' order."""
        shape = (count, *self.bundle.tensors["latents"].shape[1:])
        seeds = [seed] if isinstance(seed, int | np.integer) else seed
        if not isinstance(seeds, Sequence) or isinstance(seeds, str) or (seeds is seed and len(seeds) != count):
            raise InputError(f"seed={seed!r}: an integer, or a list with one integer for each of {count} pictures")
        generators = [self._first_generator().manual_seed(s) if i == 0 else Generator(s) for i, s in enumerate(seeds)]
        return draw_run(schedule, generators, shape, None if latents is None else _check_latents(latents, shape))

    def _first_generator(self) -> Generator:
        """One that each thread keeps: making one takes as long as drawing a picture's noise."""
        if not hasattr(self._local, "generator"):
            self._local.generator = Generator(0)
        return self._local.generator

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            # Two tokenizers of one checkpoint have the same vocabulary: one warning is enough.
            dropped, limit = next(((t.dropped(prompt), t.max_length) for t in self._tokenizers.values()), ("", 0))
            if dropped:
                log.warning("the prompt is over %d tokens long; this part of it was dropped: %s", limit, dropped)

    def _run(self, steps: int, ids: dict[str, np.ndarray], start: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """One pass of the chain: pictures [B, H, W, 3] uint8."""
        keys = [b"".join(value[i].tobytes() for value in ids.values()) for i in range(len(start))]
        with self._lock:
            executor = self._opened()
            embeds = self.prompt_cache.get(keys)
            feeds = {
                **self._rows[steps],
                "latents": start,
                "noise": noise,
                **(ids if embeds is None else embeds),
            }
            results = executor.execute(self._plan(steps, embeds is not None), feeds, self.observe)
            if embeds is None:
                self.prompt_cache.put(keys, {name: results[name] for name in self._embeds})
            pictures = results[self.bundle.chain.output].copy()
            finite = all(np.isfinite(results[name]).all() for name in self.bundle.chain.carry)
        for picture in pictures:
            if not finite or _is_uniform(picture):
                what = "a picture of one single value" if finite else "NaN or infinite latents"
                raise PictureError(
                    f"the model made {what}; check the engine with: turbochain verify {self.bundle.path}"
                )
        return pictures

    def _plan(self, steps: int, cached: bool) -> Plan:
        key = (steps, cached)
        if key not in self._plans:
            downloads = [*self.bundle.chain.carry, *([] if cached else self._embeds)]
            given = self._embeds if cached else ()
            self._plans[key] = plan(
                self.bundle.chain, self.bundle.manifest.graphs, steps, given=given, downloads=downloads
            )
        return self._plans[key]


def _check_prompts(prompt: object, repeats: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, list | tuple) else list(prompt)
    if not prompts:
        raise InputError("prompt=[]: at least one prompt was expected")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise InputError(f"num_images_per_prompt={repeats!r}: a whole number of at least 1 was expected")
    return [check_prompt(p) for p in prompts for _ in range(repeats)]


def _check_latents(latents: object, shape: tuple[int, ...]) -> np.ndarray:
    expected = f"an array of float32 {list(shape)} was expected"
    if not isinstance(latents, np.ndarray):
        raise InputError(f"latents is of type {type(latents).__name__}: {expected}")
    if latents.dtype != np.float32 or latents.shape != shape:
        raise InputError(f"latents is {latents.dtype} {list(latents.shape)}: {expected}")
    if not np.isfinite(latents).all():
        raise InputError("latents holds NaN or infinite values")
    return latents


def _is_uniform(picture: np.ndarray) -> bool:
    value = picture[0, 0, 0]
    return bool((picture[0] == value).all() and (picture == value).all())  # the first row says no in microseconds


def _as(output_type: str, pictures: np.ndarray) -> Any:
    if output_type == "uint8":
        return pictures
    if output_type == "np":
        return pictures.astype(np.float32) / 255
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]
