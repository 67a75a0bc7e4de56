"""Time a bundle on this machine: load, first picture, every stage, and end to end."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.output import PipelineOutput
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.stream import drawing

PROMPT = "a photo of a cat wearing a red hat, studio light"
INCLUDES = (
    "end to end: prompt string to uint8 pictures [B, H, W, 3] in host memory, with tokenising, noise, every copy "
    "and all stages; without loading, the first picture, and writing a file"
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds over n runs."""

    n: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True)
class BenchResult:
    """One bench of one bundle; everything that is needed to read the figures."""

    bundle: str
    engine: str
    chain: str
    steps: int
    strength: float | None  # None: a chain that starts from no image
    guidance_scale: float  # above 1, if the UNet does not read it itself, two launches of it for each evaluation
    evaluations: int  # of the UNet, for one prompt; with an image fewer than the steps
    batch: int
    size: tuple[int, int]  # height, width
    threads: int | None
    includes: str
    load_ms: float  # manifest, hashing, engine load, tokenizers
    first_image_ms: float  # the first call after the load
    stages: dict[str, Timing]  # graph → one launch of it
    end_to_end: Timing
    end_to_end_cached: Timing  # the prompt's embeddings and the image's latents (not a stream's) are kept
    overhead: Timing  # end to end less what the device worked: tokenising, noise, checks; on a CPU also copies
    uncaptured: str | None  # on a GPU, why the chain is not one CUDA graph; None if it is, and on a CPU
    controlnet: str | None = None  # the ControlNet or T2I-Adapter that the calls use
    stream: int = 0  # frames under way, if a call is a frame of a stream: it makes a row of each of them

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def bench(
    path: str | Path,
    *,
    chain: str | None = None,
    runs: int = 10,
    warmup: int = 2,
    steps: int | None = None,
    strength: float | None = None,
    controlnet: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    engines: str | Path | None = None,
    threads: int | None = None,
    trust_engines: bool = False,
) -> BenchResult:
    """Time `runs` calls of a chain (None: the first) after `warmup` calls that are not counted.

    `strength`: of a chain that starts from an image. `controlnet`: the name of a ControlNet or T2I-Adapter. Raises what
    Pipeline.load raises, InputError for steps or a strength that the chain lacks.
    """
    start = time.perf_counter()
    pipe = Pipeline.load(
        path,
        chain=chain,
        backend=backend,
        device=device,
        engine=engine,
        engines=engines,
        threads=threads,
        trust_engines=trust_engines,
    )
    loaded = time.perf_counter()
    with pipe:
        opened = pipe.bundle.open_chain(chain)
        request = Request.sample(opened, steps, PROMPT, strength, controlnet)
        draw = drawing(pipe, request)
        draw()
        first = time.perf_counter()
        for _ in range(warmup):
            draw()
        timed = _timed(pipe, draw, runs)
        return BenchResult(
            bundle=str(path),
            engine=pipe.engine_name,
            chain=opened.name,
            steps=opened.chain.tables[request.table].steps,
            strength=opened.chain.defaults.get("strength") if strength is None else strength,
            guidance_scale=opened.chain.defaults.get("guidance_scale", 0.0),
            evaluations=opened.chain.tables[request.table].rows,
            batch=opened.batch,
            size=opened.size,
            threads=threads,
            includes=INCLUDES,
            load_ms=1e3 * (loaded - start),
            first_image_ms=1e3 * (first - loaded),
            stages={g: timing(timed.stages[g]) for g in opened.graphs if g in timed.stages},
            end_to_end=timing(timed.whole),
            end_to_end_cached=timing(timed.cached),
            overhead=timing(timed.overhead),
            uncaptured=timed.uncaptured,
            controlnet=controlnet,
            stream=opened.chain.stream,
        )


@dataclass
class _Timed:
    """The milliseconds of every call."""

    whole: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    uncaptured: str | None = None


def _timed(pipe: Pipeline, draw: Callable[..., PipelineOutput], runs: int) -> _Timed:
    """Time so many calls, each with an unknown prompt and then with the known one."""
    timed = _Timed()

    def observe(name: str, seconds: float) -> None:
        timed.stages[name].append(1e3 * seconds)

    apart = pipe.device.kind != "cpu"  # to be timed, a GPU's graphs must leave the one CUDA graph
    for _ in range(runs):
        pipe.forget()
        made = draw(observe=None if apart else observe)
        timed.whole.append(1e3 * made.seconds)
        timed.overhead.append(1e3 * (made.seconds - made.device_seconds))
        timed.uncaptured = made.uncaptured
        timed.cached.append(1e3 * draw(observe=None if apart else observe).seconds)
        if apart:
            pipe.forget()
            draw(observe=observe)
    return timed


def timing(samples_ms: Sequence[float]) -> Timing:
    """Return the figures of a list of milliseconds (percentiles interpolate linearly between samples)."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99))
    return Timing(len(samples_ms), float(min(samples_ms)), float(p50), float(p90), float(p99))
