"""`Pipeline`: prompt in, pixels out, from a bundle and one of its engines."""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from turbochain.runtime import selection
from turbochain.runtime.adapters import Adapters
from turbochain.runtime.backends import forks
from turbochain.runtime.backends.contract import Cancel, Device, Executor, Observe, Results
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import verify
from turbochain.runtime.choice import chain_of, pictures_of
from turbochain.runtime.errors import PictureError, TurbochainError
from turbochain.runtime.inputs.cache import StageCache
from turbochain.runtime.inputs.control import is_control_image
from turbochain.runtime.inputs.feeds import Feeds
from turbochain.runtime.lora import LoraMethods
from turbochain.runtime.output import PipelineOutput, as_images, problem
from turbochain.runtime.ready import Caches, Held, ReadyChain
from turbochain.runtime.request import Request
from turbochain.runtime.stream import Stream, StreamOptions, drawing, open_stream, refuse_stream

PROMPT_CACHE_BYTES = IMAGE_CACHE_BYTES = 64 * 2**20
CLOSED = "the pipeline is closed; load it again"
FORKED = (
    "the pipeline was loaded before this process was forked, and the threads that it computes with are in the other "
    "process: load the pipeline in the workers alone (with gunicorn: without --preload)"
)
Arrays = Mapping[str, np.ndarray]


class Pipeline(LoraMethods):
    """A loaded engine. Calls are safe from several threads: one at a time is drawn.

    `Pipeline.load` makes one. It is a context manager. Graphs load when a chain first uses them; chains share them.
    In a process forked from the one that loaded it, a call raises TurbochainError: load it in the worker alone. On a
    CPU a fork waits until the launches that other threads are in have ended.
    """

    def __init__(
        self,
        bundle: Bundle,
        found: selection.Found,
        executor: Executor,
        *,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        lora: str | None = None,
    ) -> None:
        """Take an executor over, which this closes; `load` is the usual way."""
        self.bundle = bundle
        self.engine_name = found.name
        self._found = found
        self._executor: Executor | None = executor
        self._gone = CLOSED  # why, if there is none
        self._chains: dict[str, ReadyChain] = {}
        self._held, self._adapters = Held(), Adapters(bundle, executor, lora)
        self._lock = threading.RLock()
        self.prompt_cache, self.image_cache = StageCache(prompt_cache_bytes), StageCache(image_cache_bytes)
        self._caches = Caches(self.prompt_cache, self.image_cache)
        forks.watch(self)

    @classmethod
    def load(
        cls,
        path: str | Path | Bundle,
        *,
        chain: str | None = None,
        backend: str | None = None,
        device: str | None = None,
        engine: str | None = None,
        engines: str | Path | None = None,
        threads: int | None = None,
        keep_all: bool = False,
        trust_engines: bool = False,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        lora: str | None = None,
    ) -> "Pipeline":
        """Open a bundle's best engine for this machine, with every file hashed first, and load the graphs of `chain`.

        `path`: a folder, or a bundle on the hub as OWNER/NAME or OWNER/NAME@REVISION, which is downloaded unless the
        hub's cache has it, or a bundle that is open. `trust_engines`: also use the engines that came with a bundle from
        the hub: an engine may be code. `backend`, `device`: the best one of these. `engine`: the one of this folder
        name. `engines`: the folder with the engines (default: the bundle's engines/, and the user's cache). `threads`:
        how many CPU threads one launch may use, at most one for each CPU that this process may use (None: the backend's
        own choice). `keep_all`: keep what a backend copies of the weights for every size and batch that was drawn, and
        not for the last one alone: calls that alternate between sizes load nothing then, and each size takes memory.
        The UNet with slots for adapters stays beside the plain one then, too; else it takes its place.
        `prompt_cache_bytes`, `image_cache_bytes`: bounds of the prompt embeddings and of the encoded pictures that
        are kept. `lora`: how adapters are loaded, "slots" or "patch" (with ONNX Runtime on a CPU in fp32; None: "slots"
        if the bundle has any). Raises BundleError if the bundle is damaged or has no engine that fits, BackendMissing
        if the backend is not installed, VerificationError if an engine that was built on another machine fails its
        checks on this one.
        """
        bundle = path if isinstance(path, Bundle) else Bundle.open(path, trust_engines=trust_engines)
        opened = bundle.open_chain(chain)
        found = selection.select(opened, backend, device, engine, engines)
        executor = selection.open_executor(bundle, found, device=device, threads=threads, keep_all=keep_all)
        caches = {"prompt_cache_bytes": prompt_cache_bytes, "image_cache_bytes": image_cache_bytes}
        try:
            pipe = cls(bundle, found, executor, lora=lora, **caches)
            pipe._ready(opened.name)
        except BaseException:
            executor.close()
            raise
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: object = None,
        mask_image: object = None,
        strength: float | None = None,
        chain: str | None = None,
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
        inputs: Arrays | None = None,
        modes: Collection[str] = (),
        output_type: str = "pil",
        observe: Observe | None = None,
        cancel: Cancel | None = None,
        **others: Any,
    ) -> PipelineOutput:
        """Make pictures; arguments are named and mean as in diffusers, and N = prompts · num_images_per_prompt.

        `image`: pictures to start from (see `inputs.pictures`), one or a divisor of N; `mask_image`: white is
        repainted, black is kept. `strength`, 0 to 1: a larger value changes the image more, as `int(num_inference_steps
        · strength)` steps are made. `chain`: one of the bundle's (None: of these arguments' task, of `height` and
        `width`, of the fewest pictures per pass that are enough). Without `height` and `width` a picture's own size is
        drawn if there is a chain of it, else that of the task's first chain, to which it is resized.

        `seed`: an int in 0 … 2⁶⁴−1 is one generator for the whole call, a list of N is one per picture, None draws
        one; the noise is that of `torch.Generator("cpu").manual_seed(seed)`. `latents`: unit noise [N, 4, H/8, W/8]
        fp32 in place of what is drawn for them; image-to-image takes none, and inpainting begins with these alone at
        any strength, as in diffusers. `num_inference_steps`: one that the bundle has a table for (None: the fewest
        that make a step). `guidance_scale`: above 1 the negative prompt is drawn too (None: the bundle's default).
        `output_type`: "pil", "uint8", "np" (the 8-bit levels divided by 255), or "latent" (fp32, not decoded).
        `generator`: a CPU `torch.Generator` that nothing has been drawn from, a list of N, or their seeds, instead of
        `seed`; a call leaves it after what was drawn. `prompt_embeds` [prompts, tokens, width] and, if the model
        reads them, `pooled_prompt_embeds` [prompts, width], fp32: instead of `prompt`; with guidance
        `negative_prompt_embeds` and `negative_pooled_prompt_embeds`, likewise: instead of `negative_prompt`.
        `inputs`, `modes`: arrays for further feeds of the chain, by name, and modes of it that no argument switches on.
        `others`: with a ControlNet or a T2I-Adapter those of `inputs.control.ControlOptions`, such as `control_image`;
        diffusers' further arguments, if they change nothing. `observe(graph, seconds)` is called after each
        launch. `cancel()` is asked between launches; if it returns True, the call ends with Cancelled. Raises
        InputError for a bad argument, TypeError for one that diffusers does not have either, PictureError if the model
        makes no picture.
        """
        of: dict[str, Any] = {"image": image, "mask_image": mask_image, "height": height, "width": width}
        count = pictures_of(prompt, prompt_embeds, num_images_per_prompt)
        if chain is None:
            control_image = others.get("control_image")
            if is_control_image(self.bundle, image, mask_image, others):
                image, control_image = None, image
            chain = chain_of(self.bundle, count, **{**of, "image": image, "control_image": control_image})
        request = Request.make(
            self.bundle.open_chain(chain),
            prompt,
            **of,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            inputs=inputs,
            modes=modes,
            output_type=output_type,
            **others,
        )
        output = self.draw(request, observe=observe, cancel=cancel)
        if generator is not None:
            self._ready(request.chain).feeds.advance(generator, request)
        return output

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> Stream:
        """Open a new stream of camera frames; see `Stream`. Raises InputError if another one is open."""
        return open_stream(self, prompt, **options)

    def draw(self, request: Request, *, observe: Observe | None = None, cancel: Cancel | None = None) -> PipelineOutput:
        """Carry out a request; see `__call__`."""
        start, device_seconds, uncaptured = time.perf_counter(), 0.0, None
        refuse_stream(self.bundle.open_chain(request.chain))
        ready, count = self._ready(request.chain), request.count
        feeds = ready.feeds.of_request(request)
        ready.feeds.warn_of_truncation(request.prompts)
        batch, pictures = ready.chain.batch, []
        with self._lock:  # for all batches: other threads change adapters between calls
            for first in range(0, count, batch):
                rows = [min(i, count - 1) for i in range(first, first + batch)]  # short: the last one again
                picture, results = self._run(ready, request, ready.feeds.rows(feeds, rows), observe, cancel)
                pictures.append(picture[: count - first])
                device_seconds += results.seconds
                uncaptured = results.uncaptured
            adapters = self._adapters.told
        made = pictures[0] if len(pictures) == 1 else np.concatenate(pictures)
        images = as_images(request.output_type, made)
        seconds = time.perf_counter() - start
        return PipelineOutput(images, request.seed, seconds, device_seconds, uncaptured, request.resized, adapters)

    @property
    def device(self) -> Device:
        """Return where it runs."""
        return self._opened().device

    def _opened(self) -> Executor:
        if self._executor is None:
            raise TurbochainError(self._gone)
        return self._executor

    def warmup(
        self, num_inference_steps: int | None = None, *, chain: str | None = None, controlnet: str | None = None
    ) -> None:
        """Make a picture and throw it away, so that the next call meets no first-time cost.

        `controlnet`: the ControlNet or T2I-Adapter that it uses. On a GPU a second one: with the prompt known, the
        chain is another CUDA graph.
        """
        draw = drawing(self, Request.sample(self.bundle.open_chain(chain), num_inference_steps, controlnet=controlnet))
        for _ in range(2 if self.device.kind == "cuda" else 1):
            draw()

    def forget(self) -> None:
        """Empty the caches: the next call runs every encoder."""
        with self._lock:
            self._caches.clear()

    def close(self) -> None:
        """Give back the engine's memory; a later call raises TurbochainError."""
        with self._lock:
            if self._executor is not None:
                self._executor.close()
                self._executor = None
            self._chains.clear()
            self._held.clear()
            self._adapters.clear()
            self.forget()

    def abandon(self) -> None:
        """Give up the engine in a process that was forked, where it can be neither used nor freed."""
        self._lock = threading.RLock()  # a thread that the fork has not copied may hold the other one
        if self._executor is not None:
            forks.keep_for_ever(self._executor)
            self._executor, self._gone = None, FORKED

    def __enter__(self) -> "Pipeline":
        """Return the pipeline itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _ready(self, name: str) -> ReadyChain:
        """Return a chain that can be drawn with; the first use hashes, loads and, if need be, verifies it."""
        with self._lock:
            executor = self._opened()
            if name not in self._chains:
                chain = self.bundle.open_chain(name)
                self._adapters.withdraw(executor)  # for a verification
                found = verify.prepare(chain, self._found, executor)
                if found is not self._found:  # a verification has left its own values there
                    self._held.lose_all_of(chain)
                self._found = found
                self._chains[name] = ReadyChain(chain, Feeds(chain))
            return self._chains[name]

    def _run(
        self, ready: ReadyChain, request: Request, feeds: Arrays, observe: Observe | None, cancel: Cancel | None
    ) -> tuple[np.ndarray, Results]:
        """Draw one batch: pictures [B, H, W, 3] uint8 or latents [B, 4, H/8, W/8] fp32, and the executor's results."""
        fed = {**ready.feeds.constants(request.table), **feeds}
        with self._lock:
            executor = self._opened()
            request = replace(request, modes=request.modes | self._adapters.modes(ready.chain))
            given, missing = self._caches.known(ready, request, fed, self._adapters)
            planned = ready.plan(request, tuple(given))
            self._adapters.patch(executor, planned.plan.graphs)
            executor.load(planned.plan.graphs)
            self._held.begin(executor, ready, planned, self._adapters)
            try:
                results = executor.execute(planned.plan, {**fed, **given}, observe=observe, cancel=cancel)
            finally:
                self._held.lose(planned.written)  # another plan's name for the same buffer
            self._caches.keep(ready, missing, results.arrays)
            pictures = results.arrays[ready.result(request)].copy()
            finite = all(np.isfinite(results.arrays[name]).all() for name in ready.chain.chain.carry)
        if found := problem(pictures, finite, request.output_type):
            raise PictureError(f"the model made {found}; check the engine with: turbochain verify {self.bundle.path}")
        return pictures, results
