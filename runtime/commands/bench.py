"""How long a bundle takes here: load, first picture, every stage, and end to end."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.pipeline import Pipeline

PROMPT = "a photo of a cat wearing a red hat, studio light"
INCLUDES = (
    "end to end: prompt string to uint8 pictures [B, H, W, 3] in host memory, with tokenising, noise, every copy "
    "and all stages; without loading, the first picture, and image encoding"
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
    steps: int
    batch: int
    size: tuple[int, int]  # height, width
    threads: int | None
    includes: str
    load_ms: float  # manifest, hashing, engine load, tokenizers
    first_image_ms: float  # the first call after the load
    stages: dict[str, Timing]  # graph → one launch of it
    end_to_end: Timing
    end_to_end_cached: Timing  # the prompt's embeddings are kept: no text encoder runs
    overhead: Timing  # end to end less what the device worked: tokenising, noise, checks; on a CPU also copies
    uncaptured: str | None  # on a GPU, why the chain is not one CUDA graph; None where it is, and on a CPU

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench(
    path: str | Path,
    *,
    runs: int = 10,
    warmup: int = 2,
    steps: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> BenchResult:
    """Time `runs` calls after `warmup` calls that are not counted. Raises what Pipeline.load raises."""
    start = time.perf_counter()
    pipe = Pipeline.load(path, backend=backend, device=device, engine=engine, threads=threads)
    loaded = time.perf_counter()
    with pipe:
        steps = pipe.bundle.steps[0] if steps is None else steps
        _call(pipe, steps)
        first = time.perf_counter()
        for _ in range(warmup):
            _call(pipe, steps)
        stages: dict[str, list[float]] = defaultdict(list)
        whole, cached, overhead = [], [], []

        def observe(graph: str, seconds: float) -> None:
            stages[graph].append(1e3 * seconds)

        apart = pipe.device.kind != "cpu"  # to be timed, a GPU's stages must leave the one graph
        for _ in range(runs):
            pipe.prompt_cache.clear()
            pipe.observe = None if apart else observe
            whole.append(_call(pipe, steps))
            overhead.append(whole[-1] - 1e3 * pipe.busy_seconds)
            cached.append(_call(pipe, steps))
            if apart:
                pipe.prompt_cache.clear()
                pipe.observe = observe
                _call(pipe, steps)
        return BenchResult(
            bundle=str(path),
            engine=pipe.engine_name,
            steps=steps,
            batch=pipe.bundle.batch,
            size=pipe.bundle.size,
            threads=threads,
            includes=INCLUDES,
            load_ms=1e3 * (loaded - start),
            first_image_ms=1e3 * (first - loaded),
            stages={g: timing(stages[g]) for g in pipe.bundle.chain.graphs if g not in pipe.bundle.chain.once},
            end_to_end=timing(whole),
            end_to_end_cached=timing(cached),
            overhead=timing(overhead),
            uncaptured=pipe.uncaptured,
        )


def timing(samples_ms: Sequence[float]) -> Timing:
    """The figures of a list of milliseconds (percentiles interpolate linearly between samples)."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99))
    return Timing(len(samples_ms), float(min(samples_ms)), float(p50), float(p90), float(p99))


def _call(pipe: Pipeline, steps: int) -> float:
    start = time.perf_counter()
    prompts = [PROMPT] * pipe.bundle.batch
    pipe(prompts, num_inference_steps=steps, seed=0, output_type="uint8")
    return 1e3 * (time.perf_counter() - start)
