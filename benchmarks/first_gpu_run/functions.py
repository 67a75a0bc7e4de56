"""Step: every function of cuda.py once, and what CUDA refuses. Is CUDA as the tests' stand-in assumes?"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.backends import cuda
from turbochain.runtime.errors import CudaError, OutOfMemory, TurbochainError

from .results import Report

SIZE = 2**20  # bytes
DTYPE = "uint8"


def run(report: Report, prepared: Path) -> None:
    """Try everything; each by itself, so that one that fails says nothing of the others."""
    for name, work in {**WORKS, **REFUSED}.items():
        with made() as bench:
            report.attempt(name, partial(work, bench))
    report.attempt("the same after all of it", lambda: all(_fresh(work) for work in WORKS.values()))


@dataclass
class Bench:
    """A session with two streams, page-locked memory, and two blocks of memory of its size."""

    session: cuda.Session
    stream: Any
    side: Any
    fork: Any
    join: Any
    host: np.ndarray
    other: np.ndarray  # another such array, which a captured graph must not touch
    first: int
    second: int

    @property
    def address(self) -> int:
        """Return the page-locked array's address."""
        return self.host.ctypes.data


@contextmanager
def made() -> Iterator[Bench]:
    """Take the GPU, and give everything back at the end."""
    session = cuda.Session(cuda.find("cuda")[0])
    try:
        with session.active():
            streams, events = (session.stream(), session.stream()), (session.event(), session.event())
            cuda.record_event(events[1], streams[1])
            host, other = (session.pinned((SIZE,), DTYPE) for _ in range(2))
            first, second = (session.allocate(SIZE, "a block of the test") for _ in range(2))
            yield Bench(session, *streams, *events, host, other, first, second)
    finally:
        session.close()


def _fresh(work: Callable[[Bench], Any]) -> bool:
    with made() as bench:
        work(bench)
    return True


def _there_and_back(bench: Bench) -> None:
    """Put on the stream: host → first → second → host."""
    cuda.copy(bench.first, bench.address, SIZE, bench.stream)
    cuda.copy(bench.second, bench.first, SIZE, bench.stream)
    bench.session.synchronize()
    bench.host[...] = 0
    cuda.copy(bench.address, bench.second, SIZE, bench.stream)
    cuda.synchronize(bench.stream)


def _random(bench: Bench, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, SIZE, DTYPE)
    bench.host[...] = values
    return values


def _require(right: bool, what: str) -> None:
    if not right:
        raise AssertionError(what)


def found(bench: Bench) -> dict[str, Any]:
    """Return the GPU, the driver and how much is free."""
    index, gpu = cuda.find("cuda:0")
    _require(cuda.call("cudaGetDevice") == index, "another GPU is the thread's")
    return {"gpu": str(gpu), "free_bytes": cuda.free_bytes(), "driver": cuda.call("cudaDriverGetVersion")}


def copies(bench: Bench) -> bool:
    """Copy to the GPU, on it, and back."""
    values = _random(bench, 0)
    _there_and_back(bench)
    _require((bench.host == values).all(), "other bytes came back")
    return True


def timing(bench: Bench) -> dict[str, float]:
    """Return the seconds between two events around a copy on the GPU."""
    start, end = bench.session.event(timing=True), bench.session.event(timing=True)
    cuda.record_event(start, bench.stream)
    cuda.copy(bench.second, bench.first, SIZE, bench.stream)
    cuda.record_event(end, bench.stream)
    cuda.synchronize(bench.stream)
    seconds = cuda.elapsed(start, end)
    _require(0 < seconds < 1, f"{seconds} s for a copy of a MiB")
    return {"copy_seconds": seconds}


def captured(bench: Bench) -> dict[str, int]:
    """Capture a fork over two streams, see that nothing is done, launch it twice with other bytes each time."""

    def enqueue() -> None:
        cuda.copy(bench.first, bench.address, SIZE, bench.stream)
        cuda.record_event(bench.fork, bench.stream)
        cuda.wait_event(bench.side, bench.fork)
        cuda.copy(bench.second, bench.first, SIZE, bench.side)
        cuda.record_event(bench.join, bench.side)
        cuda.wait_event(bench.stream, bench.join)
        cuda.copy(bench.address, bench.second, SIZE, bench.stream)

    nodes: list[int] = []

    def check(graph: Any) -> None:
        cuda.refuse_host(graph, {bench.address})
        nodes.append(cuda.call("cudaGraphGetNodes", graph, 0)[-1])

    _random(bench, 1)
    _there_and_back(bench)
    graph = bench.session.capture(bench.stream, enqueue, check)
    for seed in (2, 3):
        values = _random(bench, seed)
        cuda.launch(graph, bench.stream)
        cuda.synchronize(bench.stream)
        _require((bench.host == values).all(), "other bytes came back from the graph")
    bench.session.destroy(graph)
    return {"nodes": nodes[0]}


def nested(bench: Bench) -> bool:
    """Capture the launch of a graph in another one, look into both, and launch the outer one."""
    inner = bench.session.capture(bench.stream, lambda: cuda.copy(bench.second, bench.first, SIZE, bench.stream))

    def enqueue() -> None:
        cuda.copy(bench.first, bench.address, SIZE, bench.stream)
        cuda.launch(inner, bench.stream)
        cuda.copy(bench.address, bench.second, SIZE, bench.stream)

    outer = bench.session.capture(bench.stream, enqueue, lambda graph: cuda.refuse_host(graph, {bench.address}))
    values = _random(bench, 5)
    cuda.launch(outer, bench.stream)
    cuda.synchronize(bench.stream)
    _require((bench.host == values).all(), "other bytes came back from the graph in the graph")
    for graph in (outer, inner):
        bench.session.destroy(graph)
    return True


def another_thread(bench: Bench) -> bool:
    """Copy in a thread that has not chosen a GPU: `active` does that for it, and leaves it as it was."""
    values, errors = _random(bench, 4), []

    def work() -> None:
        try:
            before = cuda.call("cudaGetDevice")
            with bench.session.active():
                _there_and_back(bench)
            _require(cuda.call("cudaGetDevice") == before, "the thread was left on another GPU")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    _require((bench.host == values).all(), "other bytes came back")
    return True


def memory_comes_back(bench: Bench) -> dict[str, int]:
    """Return what an allocation takes, and what is missing after it was freed, in bytes."""
    before = cuda.free_bytes()
    address = bench.session.allocate(64 * SIZE, "the test")
    taken = before - cuda.free_bytes()
    bench.session.free(address)
    return {"taken": taken, "missing": before - cuda.free_bytes()}


def too_much(bench: Bench) -> dict[str, str]:
    """Ask for more than there is; the session goes on."""
    said = _refusal(lambda: bench.session.allocate(2**50, "the test"), OutOfMemory)
    copies(bench)
    return {"said": said}


def _refusal(work: Callable[[], Any], kind: type[TurbochainError] = CudaError) -> str:
    """Return how `work` was refused; AssertionError if it was not."""
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def _refused_capture(enqueue: Callable[[Bench], None]) -> Callable[[Bench], dict[str, str]]:
    """Return a check that a capture of this is refused, and that the stream works afterwards."""

    def check(bench: Bench) -> dict[str, str]:
        def put() -> None:
            cuda.copy(bench.second, bench.first, SIZE, bench.stream)
            enqueue(bench)

        def look(graph: Any) -> None:
            cuda.refuse_host(graph, {bench.address})

        said = _refusal(lambda: bench.session.capture(bench.stream, put, look))
        copies(bench)
        captured(bench)
        return {"said": said}

    return check


def _fork(bench: Bench) -> None:
    cuda.record_event(bench.fork, bench.stream)
    cuda.wait_event(bench.side, bench.fork)
    cuda.copy(bench.first, bench.second, SIZE, bench.side)


def _foreign_event(bench: Bench) -> None:
    cuda.wait_event(bench.stream, bench.join)  # which no capture has recorded


def _host_function(bench: Bench) -> None:
    cuda.call("cudaLaunchHostFunc", bench.stream, ctypes.cast(_NOTHING, ctypes.c_void_p).value, 0)


_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
_PAGEABLE = np.zeros(SIZE, DTYPE)

WORKS: dict[str, Callable[[Bench], Any]] = {
    "find": found,
    "copies": copies,
    "timing": timing,
    "capture": captured,
    "a graph in a graph": nested,
    "another thread": another_thread,
    "memory comes back": memory_comes_back,
}
REFUSED: dict[str, Callable[[Bench], Any]] = {
    "out of memory": too_much,
    "allocating in a capture": _refused_capture(lambda bench: cuda.call("cudaMalloc", SIZE)),
    "waiting in a capture": _refused_capture(lambda bench: cuda.synchronize(bench.stream)),
    "a fork that does not join": _refused_capture(_fork),
    "an event of outside": _refused_capture(_foreign_event),
    "a function of the host": _refused_capture(_host_function),
    "a copy of memory that is not page-locked": _refused_capture(
        lambda bench: cuda.copy(bench.first, _PAGEABLE.ctypes.data, SIZE, bench.stream)
    ),
    "page-locked memory of another": _refused_capture(
        lambda bench: cuda.copy(bench.first, bench.other.ctypes.data, SIZE, bench.stream)
    ),
}
