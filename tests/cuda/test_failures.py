"""Every call of a life fails once, in each way that CUDA has."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tiny_bundle
from calls import CONTROLLED, NEW, assert_nothing_left, on_cpu, output
from standin import STICKY, UNWANTED, Error, OneByOne, Runtime, StandIn, pipeline, standing_in, uncaptured

import turbochain.runtime
from turbochain.runtime import Bundle, CudaFault, OutOfMemory, Pipeline, TurbochainError, selection
from turbochain.runtime.backends.contract import Results
from turbochain.runtime.backends.gpu import GpuExecutor
from turbochain.runtime.bundle import hashing
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import CudaError

WAYS = {
    Error.cudaErrorInvalidValue: CudaError,
    Error.cudaErrorMemoryAllocation: OutOfMemory,
    Error.cudaErrorIllegalAddress: CudaFault,
}
HARMLESS = {"cudaGetDevice", "cudaSetDevice", "cudaGraphDestroy"}
"""What a life does to leave things as they were; if that fails, there is nothing to be done about it."""


class Forgetful(StandIn):
    """It keeps one plan."""

    most_plans = 1


class Unloading(StandIn):
    """It unloads a graph after each picture."""

    def execute(self, *arguments: Any, **more: Any) -> Results:
        made = super().execute(*arguments, **more)
        self.unload("unet")
        return made


Uncaptured = uncaptured(StandIn)
HARMLESS_TO: Mapping[type[GpuExecutor], set[str]] = {
    Uncaptured: {"cudaStreamSynchronize"},  # of those, the one that follows the refusal
    Unloading: {"cudaFree"},  # of those, the library's own
}


@dataclass(frozen=True)
class Life:
    """A pipeline is loaded, draws and is closed, whatever fails."""

    bundle: Bundle
    calls: Sequence[dict[str, Any]]
    kind: type[GpuExecutor] = StandIn
    observed: bool = False  # whether the call has an `observe`, which is called after each launch

    def live(self, runtime: Runtime) -> "Lived":
        """Live it once; a load that fails is tried again."""
        lived = Lived()
        pipe = self._load(lived) or self._load(lived)
        for call in self.calls if pipe else ():
            pipe._held.clear()  # restart the stream, even if the picture before failed
            lived.made.append(self._draw(pipe, call, lived))
        lived.closing = len(runtime.calls)
        if pipe:
            pipe.close()
            pipe.close()
        return lived

    def _load(self, lived: "Lived") -> Pipeline | None:
        try:
            return pipeline(self.bundle, self.kind)
        except TurbochainError as error:
            lived.errors.append((type(error), str(error)))
            return None

    def _draw(self, pipe: Pipeline, call: dict[str, Any], lived: "Lived") -> np.ndarray | None:
        try:
            made = output(pipe, call, observe=(lambda graph, seconds: None) if self.observed else None)
        except TurbochainError as error:
            lived.errors.append((type(error), str(error)))
            return None
        lived.uncaptured += [made.uncaptured] if made.uncaptured not in (None, UNWANTED) else []
        return made.images

    def right(self) -> list[np.ndarray]:
        """Return what the CPU backend makes of its calls."""
        with on_cpu(self.bundle.path) as pipe:
            made = []
            for call in self.calls:
                pipe._held.clear()
                made.append(output(pipe, call).images)
            return made


@dataclass
class Lived:
    """What became of a life."""

    errors: list[tuple[type, str]] = field(default_factory=list)  # without what a traceback holds
    made: list[np.ndarray | None] = field(default_factory=list)
    uncaptured: list[str] = field(default_factory=list)
    closing: int = 0  # the first call of the end


Site = tuple[str, tuple[tuple[str, int], ...]]
"""A function of CUDA, and the lines of ours, from the pipeline's on, through which it was called."""


class Noted(list[str]):
    """The calls of a life, with the site of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[Site] = []

    def append(self, name: str) -> None:
        super().append(name)
        self.sites.append((name, tuple(_ours(sys._getframe(1)))))


OURS = str(Path(turbochain.runtime.__file__).parent)


def _ours(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def check(life: Life, right: Sequence[np.ndarray], at: int, status: Error) -> None:
    """Let one call of a life fail; raises if anything is not as it must be."""
    with standing_in(at) as runtime:
        runtime.fail[at] = status
        lived = life.live(runtime)
        name, kinds = runtime.calls[at], {kind for kind, _ in lived.errors}
        harmless = HARMLESS | HARMLESS_TO.get(life.kind, set())
        assert kinds <= {WAYS[status]}, (at, name, lived.errors)
        if status in STICKY:  # from the first error on each call has the same
            drawn = [made is not None for made in lived.made]
            assert drawn == sorted(drawn, reverse=True), (at, name, drawn)
            assert kinds or at >= lived.closing or name in harmless, (at, name)
        else:
            assert len(lived.errors) + bool(lived.uncaptured) <= 1, (at, name, lived.errors, lived.uncaptured)
            if not lived.errors and not lived.uncaptured:
                assert at >= lived.closing or name in harmless, (at, name)
            assert len(lived.made) == len(life.calls) and runtime.leaked() == [], (at, name, runtime.leaked())
        for made, expected in zip(lived.made, right, strict=False):
            assert made is None or np.array_equal(made, expected), (at, name)
        problems = runtime.problems()
        if status in STICKY and at >= lived.closing and name == "cudaFree":  # the stages are being destroyed already
            problems = [problem for problem in problems if "a library's object" not in problem]
        assert problems == [], (at, name)


SHORT = (tiny_bundle.call("a cat", 1, steps=1), tiny_bundle.call("a dog", 2, steps=1))
MODE = (
    tiny_bundle.call("a cat", 1),
    tiny_bundle.call("a cat", 1, control=2),  # a plan with more scratch memory
    tiny_bundle.call("a cat", 1, control=3),
)
LONG = (NEW, CONTROLLED, NEW, CONTROLLED)


@pytest.fixture(scope="module")
def lives(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Life]]:
    """The lives by name: the first one has every call tried, the others those that it lacks."""
    tiny, long = Bundle.open(tiny_bundle.write(tmp_path_factory.mktemp("tiny"))), Bundle.open(small)
    original, opened = Bundle.open_chain, dict[tuple[Path, str | None], OpenChain]()

    def open_chain(bundle: Bundle, name: str | None = None) -> OpenChain:
        return opened.setdefault((bundle.path, name), original(bundle, name))

    with pytest.MonkeyPatch.context() as patch:
        # Nobody changes the files between two lives, so they are read once.
        patch.setattr(Bundle, "open_chain", open_chain)
        patch.setattr(hashing, "check_all", lambda *_, **more: None)
        patch.setattr(selection, "admit", lambda chain, found: None)
        yield {
            "short": Life(tiny, SHORT),
            "with a mode": Life(tiny, MODE),
            "observed": Life(tiny, SHORT, observed=True),
            "uncaptured": Life(tiny, SHORT, Uncaptured),
            "forgetful": Life(tiny, (MODE[1], MODE[0], MODE[2]), Forgetful),
            "unloading": Life(tiny, SHORT, Unloading),
            "one by one": Life(tiny, MODE, OneByOne),
            "long": Life(long, LONG),
        }


NAMES = ("short", "with a mode", "observed", "uncaptured", "forgetful", "unloading", "one by one", "long")


@pytest.fixture(scope="module")
def right(lives: Mapping[str, Life]) -> dict[str, list[np.ndarray]]:
    """What the CPU backend makes in each life."""
    made = {id(life.calls): life.right() for life in lives.values()}
    return {name: made[id(life.calls)] for name, life in lives.items()}


@pytest.fixture(scope="module")
def sites(lives: Mapping[str, Life]) -> dict[str, list[Site]]:
    """The site of each call of each life."""
    found = {}
    for name, life in lives.items():
        with standing_in() as runtime:
            noted = runtime.calls = Noted()
            life.live(runtime)
        found[name] = noted.sites
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_life_without_a_failure(lives: Mapping[str, Life], right: Mapping[str, list[np.ndarray]], name: str) -> None:
    with standing_in() as runtime:
        lived = lives[name].live(runtime)
        assert not lived.errors and not lived.uncaptured
        for made, expected in zip(lived.made, right[name], strict=True):
            np.testing.assert_array_equal(made, expected)
        assert_nothing_left(runtime)


def test_different_calls_make_different_pictures(right: Mapping[str, list[np.ndarray]]) -> None:
    for name, calls in (("short", SHORT), ("with a mode", MODE)):
        assert len({image.tobytes() for image in right[name]}) == len(calls)
    assert len({image.tobytes() for image in right["long"]}) == len(LONG) / 2


@pytest.mark.parametrize("status", WAYS, ids=lambda status: status.name)
def test_every_call_of_a_life_fails(
    lives: Mapping[str, Life],
    right: Mapping[str, list[np.ndarray]],
    sites: Mapping[str, list[Site]],
    status: Error,
) -> None:
    assert len(sites["short"]) > 150
    for at in range(len(sites["short"])):
        check(lives["short"], right["short"], at, status)


@pytest.mark.parametrize("status", WAYS, ids=lambda status: status.name)
def test_every_call_that_other_lives_make_elsewhere_fails(
    lives: Mapping[str, Life],
    right: Mapping[str, list[np.ndarray]],
    sites: Mapping[str, list[Site]],
    status: Error,
) -> None:
    """So each function fails at each line of ours that calls it, in whatever we were about."""
    tried = {*sites["short"]}
    for name, found in sites.items():
        for at, site in enumerate(found):
            if site not in tried:
                check(lives[name], right[name], at, status)
                tried.add(site)
    assert tried == {site for found in sites.values() for site in found}


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("status", WAYS, ids=lambda status: status.name)
def test_every_call_of_other_lives_fails(
    lives: Mapping[str, Life],
    right: Mapping[str, list[np.ndarray]],
    sites: Mapping[str, list[Site]],
    status: Error,
    name: str,
) -> None:
    for at in range(len(sites[name])):
        check(lives[name], right[name], at, status)
