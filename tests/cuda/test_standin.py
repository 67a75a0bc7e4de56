"""The stand-in's own rules: the functions that are called, the memory, the order, and what a capture refuses."""

import ctypes
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real
from standin import Error, Module, Runtime, standing_in

from turbochain.runtime import CudaFault, OutOfMemory
from turbochain.runtime.backends import cuda
from turbochain.runtime.errors import CudaError

NODES = real.cudaGraphNodeType


@pytest.fixture
def gpu() -> Iterator[Runtime]:
    with standing_in() as runtime:
        yield runtime


@pytest.fixture
def session(gpu: Runtime) -> Iterator[cuda.Session]:
    made = cuda.Session(0)
    yield made
    made.close()
    if not gpu.sticky:
        assert gpu.leaked() == []


def test_it_has_the_functions_that_are_called_and_no_others() -> None:
    """With as many arguments as cuda-bindings' have."""
    source = Path(inspect.getfile(cuda)).read_text()
    own = {name: member for name, member in vars(Runtime).items() if name.startswith("cuda")}
    functions = {name: member for name, member in own.items() if inspect.isfunction(member)}
    named = {*re.findall(r"\bcuda[A-Z]\w+", source)}
    assert {*own} == {name for name in named if hasattr(real, name)}
    for name, member in functions.items():
        theirs = inspect.signature(getattr(real, name)).parameters
        assert len(inspect.signature(member).parameters) - 1 == len(theirs), name


def array(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (4 * count)).from_address(address), np.float32)


def test_memory_is_nan_until_it_is_written_and_after_it_is_freed(gpu: Runtime) -> None:
    address = cuda.call("cudaMalloc", 16)
    values = array(address, 4)
    assert np.isnan(values).all()
    values[:] = 1
    cuda.call("cudaFree", address)
    assert np.isnan(values).all() and gpu.problems() == []
    values[:] = 1
    assert "after it was freed" in gpu.problems()[0]


def test_what_is_written_beside_a_block_is_seen(gpu: Runtime) -> None:
    address = cuda.call("cudaMallocHost", 16)
    for place in (-1, 4):
        array(address + 4 * place, 1)[:] = 1
        assert "beside a block" in gpu.problems()[0]
        array(address + 4 * place, 1).view(np.uint32)[:] = 0xA5A5A5A5
    assert gpu.problems() == []


def order(seed: int) -> str:
    """The order of kernels: a on one stream; b on another, and c there after a."""
    with standing_in(seed) as gpu:
        session, module, done = cuda.Session(0), Module(gpu, 0), []
        one, two, event = session.stream(), session.stream(), session.event()
        module.launch(one, lambda: done.append("a"), ())
        cuda.record_event(event, one)
        module.launch(two, lambda: done.append("b"), ())
        cuda.wait_event(two, event)
        module.launch(two, lambda: done.append("c"), ())
        session.synchronize()
        module.unload()
        session.close()
        assert (gpu.problems(), gpu.leaked()) == ([], [])
    return "".join(done)


def test_streams_go_on_in_any_order_that_events_allow() -> None:
    assert {order(seed) for seed in range(40)} == {"abc", "bac"}


class Streams:
    """Two streams, events, a kernel: what a capture is made of."""

    def __init__(self, session: cuda.Session, gpu: Runtime) -> None:
        self.gpu, self.session, self.module = gpu, session, Module(gpu, 0)
        self.main, self.side = session.stream(), session.stream()
        self.fork, self.join, self.outside = session.event(), session.event(), session.event()
        cuda.record_event(self.outside, self.main)
        self.block, self.mine, self.other = session.allocate(16, "a test"), *(session.pinned((4,), "u1") for _ in "ab")
        self.pageable = np.zeros(4, np.uint8)

    def kernel(self, stream: Any) -> None:
        self.module.launch(stream, lambda: None, ())

    def forked(self, *, back: bool = True) -> None:
        cuda.record_event(self.fork, self.main)
        cuda.wait_event(self.side, self.fork)
        self.kernel(self.side)
        cuda.record_event(self.join, self.side)
        if back:
            cuda.wait_event(self.main, self.join)


@pytest.fixture
def streams(session: cuda.Session, gpu: Runtime) -> Iterator[Streams]:
    made = Streams(session, gpu)
    yield made
    if not gpu.sticky:
        gpu.modules.remove(made.module)


REFUSED: dict[str, tuple[Callable[[Streams], object], Error]] = {
    "allocating": (lambda s: s.session.allocate(4, "a test"), Error.cudaErrorStreamCaptureUnsupported),
    "page-locking": (lambda s: s.session.pinned((4,), "u1"), Error.cudaErrorStreamCaptureUnsupported),
    "freeing": (lambda s: cuda.call("cudaFree", s.block), Error.cudaErrorStreamCaptureUnsupported),
    "waiting": (lambda s: cuda.synchronize(s.main), Error.cudaErrorStreamCaptureUnsupported),
    "pageable memory": (
        lambda s: cuda.copy(s.block, s.pageable.ctypes.data, 4, s.main),
        Error.cudaErrorStreamCaptureUnsupported,
    ),
    "an event of outside": (lambda s: cuda.wait_event(s.main, s.outside), Error.cudaErrorStreamCaptureIsolation),
    "a fork that does not join": (lambda s: s.forked(back=False), Error.cudaErrorStreamCaptureUnjoined),
    "a join without a fork": (
        lambda s: [cuda.record_event(s.join, s.side), cuda.wait_event(s.main, s.join)],
        Error.cudaErrorStreamCaptureIsolation,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_capture_refuses(streams: Streams, what: str) -> None:
    """The error names it, the streams are usable again, and the next capture succeeds."""
    work, status = REFUSED[what]

    def enqueue() -> None:
        streams.kernel(streams.main)
        work(streams)

    with pytest.raises(CudaError, match=status.name):
        streams.session.capture(streams.main, enqueue)
    done: list[int] = []
    streams.module.launch(streams.main, lambda: done.append(1), ())
    streams.session.synchronize()
    graph = streams.session.capture(streams.main, lambda: streams.forked())
    cuda.launch(graph, streams.main)
    streams.session.synchronize()
    assert done == [1] and streams.gpu.problems() == []


def test_an_error_that_is_passed_over_still_ends_a_capture(streams: Streams) -> None:
    def enqueue() -> None:
        with pytest.raises(CudaError):
            streams.session.allocate(4, "a test")

    with pytest.raises(CudaError, match=Error.cudaErrorStreamCaptureInvalidated.name):
        streams.session.capture(streams.main, enqueue)


def test_another_thread_may_allocate_during_a_capture(streams: Streams) -> None:
    def enqueue() -> None:
        thread = threading.Thread(target=lambda: made.append(cuda.call("cudaMalloc", 4)))
        thread.start()
        thread.join()

    made: list[int] = []
    streams.session.capture(streams.main, enqueue)
    cuda.call("cudaFree", made[0])


def test_a_kernel_that_leaves_its_memory_is_a_fault(streams: Streams) -> None:
    for use in (streams.block + 8, streams.block + 4096):
        streams.module.launch(streams.main, lambda: None, [(use, 16)])
    with pytest.raises(CudaFault, match="restart it"):
        streams.session.synchronize()
    assert all("a kernel used 16 bytes" in problem for problem in streams.gpu.problems())


def test_a_gpu_has_as_much_memory_as_it_has() -> None:
    with standing_in(total=2**22) as gpu:
        session = cuda.Session(0)
        session.allocate(2**21, "a part")
        with pytest.raises(OutOfMemory, match=r"the whole needs 4 MiB, and 2 of 4 MiB are free"):
            session.allocate(2**22, "the whole")
        session.close()
        assert gpu.leaked() == []


KNOWN = {"Kernel", "Memcpy", "Memset", "Empty", "Graph", "Host"}
"""The kinds of nodes that can be looked into."""
HOST: dict[str, tuple[Callable[[Streams], object], str | None]] = {
    "kernels": (lambda s: s.forked(), None),
    "a copy at an address of our own": (lambda s: cuda.copy(s.block, s.mine.ctypes.data, 4, s.main), None),
    "a copy on the GPU": (lambda s: cuda.copy(s.block, s.block + 8, 4, s.main), None),
    "a fill": (lambda s: s.gpu.other_node(s.main, NODES.cudaGraphNodeTypeMemset), None),
    "nothing": (lambda s: s.gpu.other_node(s.main, NODES.cudaGraphNodeTypeEmpty), None),
    "a function of the host": (
        lambda s: s.gpu.host_function(s.main, lambda: None),
        "it calls a function of the host",
    ),
    "a copy from the host": (
        lambda s: cuda.copy(s.block, s.other.ctypes.data, 4, s.main),
        "it copies from or to memory of the host that is another's",
    ),
    "a copy to the host": (
        lambda s: cuda.copy(s.other.ctypes.data, s.block, 4, s.main),
        "it copies from or to memory of the host that is another's",
    ),
    "a node of a later CUDA": (
        lambda s: s.gpu.other_node(s.main, 99),
        "GetType gives what this cuda-bindings does not know, because the driver is newer: 99 is not a valid",
    ),
    **{
        f"a node of the kind {kind.name}": (
            lambda s, kind=kind: s.gpu.other_node(s.main, kind),
            f"it holds what cannot be looked into: {kind.name}",
        )
        for kind in (kind for kind in NODES if kind.name.removeprefix("cudaGraphNodeType") not in KNOWN)
    },
}


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("what", HOST)
def test_a_graph_that_needs_the_host_is_refused(streams: Streams, what: str, depth: int) -> None:
    """Wherever it is in the graphs of the graph, and whatever is before and after it."""
    work, reason = HOST[what]
    kernel = partial(streams.kernel, streams.main)
    harmless = streams.session.capture(streams.main, kernel)
    others = (kernel, partial(cuda.launch, harmless, streams.main))

    def check(graph: Any) -> None:
        cuda.refuse_host(graph, {streams.mine.ctypes.data})

    for before, after in ((others, ()), ((), others), (others, others)):

        def among_others(work: Callable[[], object], before: Any = before, after: Any = after) -> None:
            for one in (*before, work, *after):
                one()

        enqueue = partial(among_others, partial(work, streams))
        for _ in range(depth):
            inner = streams.session.capture(streams.main, enqueue)
            enqueue = partial(among_others, partial(cuda.launch, inner, streams.main))
        if reason is None:
            assert streams.session.capture(streams.main, enqueue, check) is not None
        else:
            with pytest.raises(CudaError, match=reason):
                streams.session.capture(streams.main, enqueue, check)
