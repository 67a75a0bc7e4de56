"""Step: is the executor right? Miniatures of both families on PyTorch's stages, against diffusers' own pictures."""

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_stages
from torch_stages import Modules, OnGpu, Place
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.backends import cuda
from turbochain.runtime.checks import verify

from . import drawn
from .chains import draw
from .prepare import MINIATURES
from .results import Report


@dataclass(frozen=True)
class Counts:
    """How often what is repeated is done."""

    repeats: int = 1000
    pictures: int = 2000  # while the memory is watched
    loads: int = 5
    timed: int = 300
    steps: tuple[int, ...] = (1, 2, 3, 4)


@dataclass(frozen=True)
class Miniature:
    """A miniature in one precision."""

    bundle: Bundle
    made: Modules
    place: Callable[[], Place]

    @contextlib.contextmanager
    def loaded(self) -> Iterator[Pipeline]:
        """Yield a pipeline of it, with memory of its own."""
        with torch_stages.pipeline(self.bundle, self.made, self.place()) as pipe:
            yield pipe


def run(report: Report, prepared: Path, place: Callable[[], Place] = OnGpu, counts: Counts = Counts()) -> None:
    """Try everything with each miniature; each by itself."""
    for family in MINIATURES:
        against_diffusers(report, prepared, place, family)
        others(report, prepared, place, family, counts)


def against_diffusers(report: Report, prepared: Path, place: Callable[[], Place], family: str) -> None:
    """Report the verification of a miniature in both precisions."""
    for precision in ("fp32", "fp16"):
        mini = miniature(prepared, place, family, precision)
        for chain in mini.bundle.manifest.chains:
            report.attempt(f"{family} {precision}, {chain}, against diffusers", partial(checks, mini, precision, chain))


def others(report: Report, prepared: Path, place: Callable[[], Place], family: str, counts: Counts) -> None:
    """Report everything else, in fp32."""
    mini = miniature(prepared, place, family, "fp32")
    for name, work in WORKS.items():
        report.attempt(f"{family}, {name}", partial(work, mini, counts))


def miniature(prepared: Path, place: Callable[[], Place], family: str, precision: str) -> Miniature:
    """Return a miniature, with its weights drawn and where it runs; PyTorch makes the same values in every run."""
    exact()
    bundle = Bundle.open(prepared / f"{family}.bundle")
    parts, where = drawn.models(MINIATURES[family][0]), place()
    remedies = torch_stages.remedies_of(bundle, precision)
    return Miniature(bundle, torch_stages.of_parts(parts, bundle, remedies, where.device), place)


def exact() -> None:
    """Let PyTorch make the same values in every run, and fp32 mean fp32."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def checks(mini: Miniature, precision: str, name: str) -> dict[str, Any]:
    """Return every figure of a chain's verification, the worst first, and whether all passed."""
    chain, remedies = mini.bundle.open_chain(name), torch_stages.remedies_of(mini.bundle, precision)
    executor = torch_stages.executor(mini.bundle, mini.made, mini.place())
    try:
        executor.load(chain.graphs)
        found = verify.verify(chain, executor, {graph: remedies[graph].precision for graph in chain.graphs})
    finally:
        executor.close()
    said = {f"{c.stage}: {c.metric}": f"{c.value:.3g} ({verify.bound_text(c)})" for c in found}
    return {"passed": all(c.passed for c in found), **said}


def captured(mini: Miniature, counts: Counts) -> dict[str, Any]:
    """Return for each step count why it is not one graph (None: it is), and whether the stages make the same bits."""
    answer: dict[str, Any] = {}
    with mini.loaded() as pipe:
        for steps in counts.steps:
            whole = draw(pipe, steps=steps)
            apart = draw(pipe, steps=steps, observe=lambda graph, seconds: None)
            known = [draw(pipe, steps=steps, known=True) for _ in range(2)][1]
            answer[f"{steps} steps"] = {
                "uncaptured": whole.uncaptured or known.uncaptured,
                "same_as_stages": _equal(whole.images, apart.images),
                "same_with_known_prompt": _equal(whole.images, known.images),
            }
    return answer


def repeated(mini: Miniature, counts: Counts) -> dict[str, int]:
    """Return how many of so many repeats differ, other pictures being drawn between them."""
    with mini.loaded() as pipe:
        first, other = draw(pipe, steps=2).images, 0
        for i in range(counts.repeats):
            if i % 3 == 0:
                draw(pipe, seed=i + 1, steps=1 + i % len(counts.steps), prompt=f"another prompt {i}")
            other += not _equal(draw(pipe, steps=2, known=i % 2 == 1).images, first)
        return {"repeats": counts.repeats, "different": other}


def two_pipelines(mini: Miniature, counts: Counts) -> bool:
    """Return whether two pipelines that draw in turn make what one makes alone."""
    with mini.loaded() as one:
        alone = [draw(one, seed).images for seed in range(3)]
        with mini.loaded() as two:
            same = [_equal(draw(p, seed).images, alone[seed]) for seed in range(3) for p in (two, one)]
        return all([*same, _equal(draw(one).images, alone[0])])


def threads(mini: Miniature, counts: Counts) -> bool:
    """Return whether four threads draw from one pipeline what one draws."""
    with mini.loaded() as pipe:
        right, made = draw(pipe, seed=0).images, list[bool]()

        def work() -> None:
            made.extend(_equal(draw(pipe, seed=0, known=i % 2 == 1).images, right) for i in range(3))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return len(made) == 12 and all(made)


def memory(mini: Miniature, counts: Counts) -> dict[str, int]:
    """Return how much less GPU memory is free after so many pictures than after the first few, in bytes."""
    with mini.loaded() as pipe:

        def free_after(pictures: int) -> int:
            for i in range(pictures):
                draw(pipe, seed=i, steps=1 + i % 2, prompt=f"prompt {i % 7}", known=i % 3 == 0)
            return cuda.free_bytes()

        before = free_after(min(50, counts.pictures))
        return {"pictures": counts.pictures, "missing_bytes": before - free_after(counts.pictures)}


def loads(mini: Miniature, counts: Counts) -> dict[str, int]:
    """Return how much less GPU memory is free after so many loads than after the second, in bytes."""

    def free_after_one() -> int:
        with mini.loaded() as pipe:
            draw(pipe)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return cuda.free_bytes()

    free_after_one()
    second = free_after_one()
    return {"loads": counts.loads, "missing_bytes": second - [free_after_one() for _ in range(counts.loads)][-1]}


def host(mini: Miniature, counts: Counts) -> dict[str, float]:
    """Return the median seconds of a call in which the GPU does not work, and in which it does."""
    with mini.loaded() as pipe:
        draw(pipe)
        made = [draw(pipe, seed=seed) for seed in range(counts.timed)]
        return {
            "host_seconds": statistics.median(of.seconds - of.device_seconds for of in made),
            "gpu_seconds": statistics.median(of.device_seconds for of in made),
        }


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one == other).all())


WORKS: dict[str, Callable[[Miniature, Counts], Any]] = {
    "captured and stage by stage": captured,
    "host time": host,
    "two pipelines": two_pipelines,
    "four threads": threads,
    "repeats": repeated,
    "loads": loads,
    "memory": memory,
}
