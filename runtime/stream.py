"""`Stream`: camera frames in, pictures out; one launch of the network makes a row for each of several frames."""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from turbochain.runtime.backends.contract import Cancel, Observe
from turbochain.runtime.bundle.manifest import STREAM
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.choice import asked_size
from turbochain.runtime.errors import Cancelled, InputError, PictureError, TurbochainError
from turbochain.runtime.inputs import pictures
from turbochain.runtime.inputs.given import IMAGE
from turbochain.runtime.inputs.noise import Generator, check_seed
from turbochain.runtime.inputs.similar import Similar
from turbochain.runtime.inputs.tokenizer import check_prompt
from turbochain.runtime.output import PipelineOutput, as_images
from turbochain.runtime.request import Request

if TYPE_CHECKING:
    from turbochain.runtime.pipeline import Pipeline


class StreamOptions(TypedDict, total=False):
    """What `Pipeline.stream` takes beside the prompt."""

    num_inference_steps: int | None
    strength: float | None
    """As in image-to-image: together they must make as many steps as the bundle's stream has frames under way. None:
    the bundle's default, and the fewest steps that fit."""
    guidance_scale: float | None
    """Of a UNet that reads it. There is no classifier-free guidance in a stream: above 1 is an error elsewhere."""
    seed: int | None
    """Of every frame that has none of its own: each draws what diffusers' call with that seed draws, so that pictures
    differ as the frames do and do not flicker. None: one is drawn, for all frames."""
    similar_image_threshold: float | None
    """0 to below 1: a frame whose cosine similarity to the last one that entered is above it may be skipped, the more
    probably the more alike they are, always if they are equal. None: none is skipped. StreamDiffusion's is 0.98."""
    max_skipped: int
    """How many frames in a row may be skipped (default 10)."""
    output_type: str
    """As in `Pipeline.__call__`."""
    height: int | None
    width: int | None
    chain: str | None
    """Which stream of the bundle: of a size (None: its first), or a chain's name."""


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A frame under way."""

    seed: int
    resized: tuple[int, int] | None
    noise: np.ndarray  # [S, 4, H/8, W/8] fp32: what it draws in each of its rows


class Stream:
    """A bundle's stream of S frames under way; `Pipeline.stream` opens one. It is a context manager.

    pipe = Pipeline.load("sd-turbo.bundle", chain="stream")
    with pipe.stream("a fox in the snow", num_inference_steps=4, strength=0.5, seed=1) as stream:
        for frame in camera:  # PIL images, or arrays [H, W, 3] uint8
            if made := stream(frame):
                show(made.images[0])
        for made in stream.flush():
            show(made.images[0])

    A frame enters with the prompt of that moment and a seed, keeps them, and S − 1 calls later leaves as the picture
    that diffusers' image-to-image pipeline makes of these. `stream.prompt = "a wolf"` is for the frames that enter from
    then on. Other calls of the pipeline may come between two frames; `keep_all=True` of `Pipeline.load` spares them
    loading graphs again. An adapter that is set between two frames changes those under way too. Safe from several
    threads. A pipeline has one open stream.
    """

    def __init__(self, pipe: "Pipeline", request: Request, similar: Similar | None = None) -> None:
        """Take the request that all frames are made of, whose image is not drawn; `open_stream` is the usual way."""
        self._pipe, self._request, self._similar = pipe, request, similar
        self._chain, self._closed = pipe.bundle.open_chain(request.chain), False
        self._adapters = pipe._adapters.states  # those with which the last frame entered
        self._per_row = next(n for n in self._chain.feeds("noise") if self._chain.chain.feeds[n].when == "step")
        with pipe._lock:
            pipe._held.take(self)
            try:
                self.prompt = request.prompts[0]
                self._begin()
            except BaseException:
                self.close()
                raise

    def _begin(self) -> None:
        """Let no frame be under way."""
        chain = self._chain
        self._under_way: list[_Frame | None] = [None] * (chain.chain.stream - 1)  # the newest first
        self._last: PipelineOutput | None = None
        self._pipe._held.lose(chain.tensors[name] for name, feed in chain.chain.feeds.items() if feed.when == "held")

    @property
    def prompt(self) -> str:
        """Return the prompt of the frames that enter from now on; those under way keep theirs. It can be set."""
        return self._request.prompts[0]

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        request = dataclasses.replace(self._request, prompts=(check_prompt(prompt),))
        with self._pipe._lock:
            feeds = self._pipe._ready(request.chain).feeds
            feeds.warn_of_truncation(request.prompts)
            self._request, self._fed = request, feeds.of_request(request)
            if self._similar:
                self._similar.forget()

    def __call__(
        self, frame: object, *, seed: int | None = None, observe: Observe | None = None, cancel: Cancel | None = None
    ) -> PipelineOutput | None:
        """Let a frame enter; return the picture of the one that entered S − 1 calls before, None if there was none.

        `frame`: one picture (see `inputs.pictures`), resized to the stream's size. `seed`: this frame's own. The
        picture comes with its own frame's `seed` and `resized`. If the frame is skipped, the last picture is returned
        again. `observe`, `cancel`: as in `Pipeline.__call__`; a cancelled frame has not entered. Raises InputError for
        a bad argument, PictureError if the model makes no picture of the frame that leaves, TurbochainError after
        `close`. After any other error no frame is under way.
        """
        start = time.perf_counter()
        pixels, size = pictures.pixels("frame", frame, self._chain.size), pictures.size_of("frame", frame)
        if len(pixels) != 1:
            raise InputError(f"frame has {len(pixels)} pictures: one was expected; give them one after the other")
        own = self._request.seeds[0] if seed is None else check_seed(seed)
        with self._pipe._lock:
            self._check_open()
            if self._similar and self._adapters != self._pipe._adapters.states:
                self._similar.forget()
            if self._similar and self._last and self._similar.skips(pixels):
                return self._last
            fed = self._fed if own == self._request.seeds[0] else {**self._fed, **self._noise(own)}
            entering = _Frame(own, None if size == self._chain.size else size, fed[self._per_row][0])
            made = self._launch(start, entering, {**fed, IMAGE: pixels}, observe, cancel)
            if self._similar:
                self._similar.entered(pixels)
                self._adapters = self._pipe._adapters.states
            return made

    def flush(self) -> Iterator[PipelineOutput]:
        """Yield the pictures of the frames under way, in their order: as many launches as the oldest lacks rows each.

        A frame may enter again at any time.
        """
        while any(self._under_way):
            with self._pipe._lock:
                self._check_open()
                made = self._launch(time.perf_counter(), None, self._fed)
            if made:
                yield made

    def close(self) -> None:
        """Forget the frames under way, so that the pipeline can open another stream; a later frame is an error."""
        with self._pipe._lock:
            self._closed = True
            self._pipe._held.release(self)

    def __enter__(self) -> "Stream":
        """Return the stream itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _check_open(self) -> None:
        self._pipe._opened()
        if self._closed:
            raise TurbochainError("the stream is closed; open another with pipe.stream(prompt)")

    def _noise(self, seed: int) -> dict[str, np.ndarray]:
        feeds, request = self._pipe._ready(self._request.chain).feeds, self._request
        return feeds.noise(dataclasses.replace(request, seeds=(seed,)), [Generator(seed)])

    def _launch(
        self,
        start: float,
        entering: _Frame | None,
        fed: dict[str, np.ndarray],
        observe: Observe | None = None,
        cancel: Cancel | None = None,
    ) -> PipelineOutput | None:
        """Make one row of every frame; return the picture of the one that leaves. If none does, nobody looks.

        `start`: when the call began.
        """
        leaving, noise = self._under_way[-1], np.zeros_like(self._fed[self._per_row])
        for row, frame in enumerate((entering, *self._under_way)):
            if frame:
                noise[0, row] = frame.noise[row]
        ready, request = self._pipe._ready(self._request.chain), self._request
        try:
            made, results = self._pipe._run(ready, request, {**fed, self._per_row: noise}, observe, cancel)
        except Cancelled:
            raise
        except PictureError:
            self._under_way = [entering, *self._under_way[:-1]]
            if leaving:
                raise
            return None
        except BaseException:
            self._begin()
            raise
        self._under_way = [entering, *self._under_way[:-1]]
        if not leaving:
            return None
        images, seconds = as_images(request.output_type, made), time.perf_counter() - start
        timed = (seconds, results.seconds, results.uncaptured)
        self._last = PipelineOutput(images, leaving.seed, *timed, leaving.resized, self._pipe._adapters.told)
        return self._last


def open_stream(
    pipe: "Pipeline",
    prompt: str,
    *,
    num_inference_steps: int | None = None,
    strength: float | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    similar_image_threshold: float | None = None,
    max_skipped: int = 10,
    output_type: str = "pil",
    height: int | None = None,
    width: int | None = None,
    chain: str | None = None,
) -> Stream:
    """Return a stream of a pipeline; the arguments are those of `StreamOptions`. Raises InputError."""
    if chain is None:
        size = asked_size(pipe.bundle.sizes(STREAM)[0], height, width)
        chain = pipe.bundle.find_chain(STREAM, size, 1)
    opened = pipe.bundle.open_chain(chain)
    if not opened.chain.stream:
        raise InputError(f"chain={chain!r}: it is no stream; leave chain out, or name one whose task is {STREAM}")
    seed = secrets.randbits(64) if seed is None else check_seed(seed)
    request = Request.make(
        opened,
        check_prompt(prompt),
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        strength=strength,
        guidance_scale=guidance_scale,
        seed=seed,
        inputs={IMAGE: np.zeros((1, *opened.size, 3), np.uint8)},
        output_type=output_type,
    )
    similar = None if similar_image_threshold is None else Similar(similar_image_threshold, max_skipped, seed)
    return Stream(pipe, request, similar)


def refuse_stream(chain: OpenChain) -> None:
    """Raise InputError if a chain is a stream: a call of its own would be a picture of frames that are not there."""
    if chain.chain.stream:
        raise InputError(f"the chain {chain.name} takes one frame after the other: open it with pipe.stream(prompt)")


def drawing(pipe: "Pipeline", request: Request) -> Callable[..., PipelineOutput]:
    """Return a function that draws a sample request; of a stream one frame in each call, always another picture.

    The first call lets as many frames enter as the first picture needs.
    """
    if not pipe.bundle.open_chain(request.chain).chain.stream:
        return partial(pipe.draw, request)
    stream, frame = Stream(pipe, request), dict(request.inputs)[IMAGE].value[0].copy()
    values = itertools.cycle(range(frame.size))

    def draw(*, observe: Observe | None = None) -> PipelineOutput:
        made = None
        while made is None:
            frame.flat[next(values)] += 1
            made = stream(frame, observe=observe)
        return made

    return draw
