"""Executors that are broken on purpose: the pictures, or the stand-in, tell of each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import ALL, output
from standin import StandIn, pipeline, standing_in, uncaptured

from turbochain.runtime import TurbochainError
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.gpu import GpuExecutor
from turbochain.runtime.chain.recording import Recording


class SharedScratch(StandIn):
    """All stages have their scratch memory in the same place."""

    def _place_scratch(self, recording: Recording) -> None:
        super()._place_scratch(recording)
        for graph in self._graphs.values():
            graph.place(self._scratch[0], graph.scratch_bytes)


class NoWait(StandIn):
    """The stream does not wait for what is on the side streams."""

    def _branch(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "wait_event", lambda s, e: s is not self.stream and original["wait_event"](s, e))
            super()._branch(*arguments)


class NoFork(StandIn):
    """Side streams do not wait for what is on the stream."""

    def _branch(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "wait_event", lambda s, e: s is self.stream and original["wait_event"](s, e))
            super()._branch(*arguments)


class ImpatientHost(StandIn):
    """The host reads the results before they are there."""

    def execute(self, *arguments: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "synchronize", lambda stream: None)
            patch.setattr(cuda, "elapsed", lambda start, end: 0.0)
            return super().execute(*arguments, **more)


class Copies(StandIn):
    """Copies have another size."""

    times, more = 1.0, 0

    def _walk(self, *arguments: Any, **more: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "copy", lambda t, s, n, on: original["copy"](t, s, int(self.times * n) + self.more, on))
            super()._walk(*arguments, **more)


class HalfACopy(Copies):
    times = 0.5


class ACopyTooLong(Copies):
    more = 4


original = {name: vars(cuda)[name] for name in ("wait_event", "copy")}
BROKEN = (SharedScratch, NoWait, NoFork, ImpatientHost, HalfACopy, ACopyTooLong)


def is_noticed(kind: type[GpuExecutor], small: Path, right: list[np.ndarray], seed: int, by: str) -> bool:
    """Whether the pictures, or what the stand-in says of them, tell that an executor is broken."""
    try:
        with standing_in(seed) as runtime, pipeline(small, kind) as pipe:
            made = [output(pipe, call) for call in ALL]
    except TurbochainError:
        return True
    wrong = any(not np.array_equal(m.images, expected) for m, expected in zip(made, right, strict=True))
    return wrong or (by == "capture" and any(m.uncaptured for m in made)) or bool(runtime.problems())


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("by", ["capture", "order"])
def test_a_broken_executor_is_noticed(small: Path, right: list[np.ndarray], kind: type[StandIn], by: str) -> None:
    """Among thirty orders; stage by stage too, where no capture tells of it."""
    tried = kind if by == "capture" else uncaptured(kind)
    assert any(is_noticed(tried, small, right, seed, by) for seed in range(30))


def test_what_is_not_captured_makes_the_same_pictures(small: Path, right: list[np.ndarray]) -> None:
    """The executor that the broken ones are made of is found sound by the same measure."""
    for seed in range(5):
        assert not is_noticed(uncaptured(StandIn), small, right, seed, "order")
        assert not is_noticed(StandIn, small, right, seed, "capture")
