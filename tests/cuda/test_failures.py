"""Every call of a life fails once, in each way that CUDA has."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from calls import CONTROLLED, NEW, assert_nothing_left, draw, on_cpu, output
from standin import STICKY, Error, Runtime, StandIn, pipeline, standing_in

from turbochain.runtime import Bundle, CudaFault, OutOfMemory, Pipeline, TurbochainError
from turbochain.runtime.errors import CudaError

WAYS = {
    Error.cudaErrorInvalidValue: CudaError,
    Error.cudaErrorMemoryAllocation: OutOfMemory,
    Error.cudaErrorIllegalAddress: CudaFault,
}
LIFE = (NEW, CONTROLLED, NEW, CONTROLLED)


@dataclass
class Life:
    """A pipeline that is loaded, drawn with and closed, whatever fails."""

    runtime: Runtime
    errors: list[tuple[type, str]] = field(default_factory=list)  # without what a traceback holds
    made: list[np.ndarray | None] = field(default_factory=list)
    uncaptured: list[str] = field(default_factory=list)
    closing: int = 0  # the first call of the end

    def live(self, bundle: Bundle) -> None:
        pipe = self._load(bundle) or self._load(bundle)
        for call in LIFE if pipe else ():
            pipe._held.clear()  # the stream begins anew, whatever became of the picture before
            self.made.append(self._draw(pipe, call))
        self.closing = len(self.runtime.calls)
        if pipe:
            pipe.close()
            pipe.close()

    def _load(self, bundle: Bundle) -> Pipeline | None:
        try:
            return pipeline(bundle, StandIn)
        except TurbochainError as error:
            self.errors.append((type(error), str(error)))
            return None

    def _draw(self, pipe: Pipeline, call: dict) -> np.ndarray | None:
        try:
            made = output(pipe, call)
        except TurbochainError as error:
            self.errors.append((type(error), str(error)))
            return None
        self.uncaptured += [made.uncaptured] if made.uncaptured else []
        return made.images


@pytest.fixture(scope="module")
def bundle(small: Path) -> Bundle:
    """Opened once for all lives."""
    return Bundle.open(small)


@pytest.fixture(scope="module")
def pictures(small: Path) -> list[np.ndarray]:
    """What the CPU makes of `LIFE`."""
    with on_cpu(small) as pipe:
        made = []
        for call in LIFE:
            pipe._held.clear()
            made.append(draw(pipe, call))
        return made


def check_a_life(bundle: Bundle, pictures: list[np.ndarray], at: int, status: Error, seed: int = 0) -> bool:
    """One call of a life fails; False if the life has no so many calls."""
    with standing_in(seed) as runtime:
        runtime.fail[at] = status
        life = Life(runtime)
        life.live(bundle)
        if at >= len(runtime.calls):
            return False
        name, kinds = runtime.calls[at], {kind for kind, _ in life.errors}
        assert kinds <= {WAYS[status]}, (at, name, life.errors)
        if status in STICKY:  # from the first error on each call has the same
            drawn = [made is not None for made in life.made]
            assert drawn == sorted(drawn, reverse=True), (at, name, drawn)
            assert kinds or at >= life.closing or name in HARMLESS, (at, name)
        else:
            assert len(life.errors) + bool(life.uncaptured) <= 1, (at, name, life.errors, life.uncaptured)
            if not life.errors and not life.uncaptured:
                assert at >= life.closing or name in HARMLESS, (at, name)
            assert len(life.made) == len(LIFE) and runtime.leaked() == [], (at, name, runtime.leaked())
        for made, expected in zip(life.made, pictures, strict=False):
            assert made is None or np.array_equal(made, expected), (at, name)
        problems = runtime.problems()
        if status in STICKY and at >= life.closing and name == "cudaFree":  # the stages are being destroyed already
            problems = [problem for problem in problems if "a library's object" not in problem]
        assert problems == [], (at, name)
        return True


HARMLESS = {"cudaGetDevice", "cudaSetDevice", "cudaGraphDestroy"}
"""What a life does to leave things as they were; if that fails, there is nothing to be done about it."""


def test_a_life_without_a_failure(bundle: Bundle, pictures: list[np.ndarray]) -> None:
    with standing_in() as runtime:
        life = Life(runtime)
        life.live(bundle)
        assert not life.errors and not life.uncaptured
        for made, expected in zip(life.made, pictures, strict=True):
            np.testing.assert_array_equal(made, expected)
        assert_nothing_left(runtime)


@pytest.mark.parametrize("status", WAYS, ids=lambda status: status.name)
def test_one_call_of_a_life_fails(bundle: Bundle, pictures: list[np.ndarray], status: Error) -> None:
    """Of 21 calls each way has one: first, eighth or fifteenth."""
    at = first = 7 * [*WAYS].index(status)
    while check_a_life(bundle, pictures, at, status, seed=at):
        at += 21
    assert at > first + 500


@pytest.mark.full
@pytest.mark.parametrize("status", WAYS, ids=lambda status: status.name)
def test_every_call_of_a_life_fails(bundle: Bundle, pictures: list[np.ndarray], status: Error) -> None:
    at = 0
    while check_a_life(bundle, pictures, at, status, seed=at):
        at += 1
    assert at > 500
