"""Stages on the stand-in: ONNX Runtime's CPU provider, on addresses of the stand-in's memory, as three kernels."""

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbochain.runtime import Bundle, Pipeline, selection
from turbochain.runtime.backends import cuda, onnxruntime
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.cpu import CpuGraph
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle.manifest import Gpu, Graph, Tensor
from turbochain.runtime.errors import CudaError, OutOfMemory, TurbochainError

from . import memory
from .machine import Error, Module, Refused
from .runtime import Runtime
from .streams import Span

WEIGHTS = 4096  # bytes: what a stage keeps on the GPU for itself
Kernel = tuple[Callable[[], None], tuple[Span, ...]]
"""What it does, and the memory that it uses."""


@contextlib.contextmanager
def standing_in(seed: int = 0, **options: Any) -> Iterator[Runtime]:
    """Put a stand-in in the place of the CUDA runtime."""
    runtime = Runtime(seed, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_runtime", lambda: runtime)
        yield runtime


def pipeline(bundle: Path | Bundle, kind: type[GpuExecutor], index: int = 0) -> Pipeline:
    """Load a bundle that has an engine of ONNX Runtime onto a GPU of the stand-in."""
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    first, found = bundle.open_chain(), _engine(bundle.path)
    pipe = Pipeline(bundle, found, kind(Opened(bundle, found.folder, found.engine.options, gpu(index))))
    try:
        pipe._ready(first.name)
    except BaseException:
        pipe.close()
        raise
    return pipe


@functools.cache  # a bundle is loaded many times
def _engine(path: Path) -> selection.Found:
    return selection.select(Bundle.open(path).open_chain(), "onnxruntime", "cpu")


def gpu(index: int = 0) -> Device:
    """A device of the stand-in."""
    return Device("cuda", index, Gpu("Stand-in", "9.0", 2**33))


class StandIn(GpuExecutor):
    """The executor under test, with stages that use scratch memory as TensorRT's do."""

    def load_graph(self, graph: str) -> GpuGraph:
        """Load a graph on the CPU provider, and take some memory of the GPU as its weights."""
        return Stage(graph, self.opened, self.opened.bundle.manifest.graphs[graph])


class OneByOne(StandIn):
    """The same with stages that keep memory of their own and are tied to one stream, as ONNX Runtime's are."""

    concurrent = False

    def load_graph(self, graph: str) -> GpuGraph:
        """See StandIn."""
        return Stage(graph, self.opened, self.opened.bundle.manifest.graphs[graph], shares=False)


UNWANTED = "this test wants it so"


def uncaptured(kind: type[StandIn]) -> type[StandIn]:
    """Return the same executor with graphs that may not be launched, so that each plan is run graph by graph."""

    class Uncaptured(kind):  # type: ignore[valid-type, misc]
        def check_captured(self, graph: Any) -> None:
            raise CudaError(UNWANTED)

    return Uncaptured


class Stage(GpuGraph):
    """A graph: a kernel that copies the inputs into scratch memory, one that computes there, one that copies out.

    So it reads its inputs before it computes, and its scratch memory is its own only as long as it runs.
    """

    def __init__(self, name: str, opened: Opened, graph: Graph, *, shares: bool = True) -> None:
        """`shares`: whether the scratch memory is given by the executor; else it is the stage's own."""
        self.name, self.graph, self.loaded = name, graph, load(name, opened)
        self.offsets: dict[str, int] = {}
        size = 0
        for tensor in (*graph.inputs, *graph.outputs):
            self.offsets[tensor.name] = size
            size += -(-tensor.nbytes // cuda.ALIGNMENT) * cuda.ALIGNMENT
        runtime, blocks = cuda._runtime(), [cuda.call("cudaMalloc", WEIGHTS)]
        self.module = Module(runtime, opened.device.index)
        weakref.finalize(self, _destroy, runtime, self.module, blocks).atexit = False
        self.weights: int = blocks[0]
        memory.move(self.weights, WEIGHT.ctypes.data, WEIGHTS)
        self.scratch: tuple[int, int] | None = None
        self._kernels: dict[Hashable, list[Kernel]] = {}  # where they compute → what they are
        if shares:
            self.scratch_bytes = size
        else:
            blocks.append(cuda.call("cudaMalloc", size))
            self.scratch = (blocks[1], size)

    def place(self, address: int, size: int) -> None:
        """See GpuGraph."""
        assert size == self.scratch_bytes and address % cuda.ALIGNMENT == 0
        if size:
            self.scratch = (address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """See GpuGraph."""
        assert self.scratch is not None, "a stage with scratch memory was launched before it was told where that is"
        key = (self.scratch, *addresses.items())
        if key not in self._kernels:
            self._kernels[key] = self._make(*self.scratch, dict(addresses))
        try:
            for run, uses in self._kernels[key]:
                self.module.launch(stream, run, uses)
        except Refused as refused:
            kind = OutOfMemory if refused.status == Error.cudaErrorMemoryAllocation else CudaError
            raise kind(f"the stage {self.name} failed: {refused.status.name}") from None

    def _make(self, base: int, size: int, addresses: Mapping[str, int]) -> list[Kernel]:
        """Return the kernels of a launch with its scratch memory there; they do not keep the stage alive."""
        weights, inputs, outputs = self.weights, self.graph.inputs, self.graph.outputs
        inside = {name: base + offset for name, offset in self.offsets.items()}
        run = self.loaded.bind({t.name: array(t, inside[t.name]) for t in (*inputs, *outputs)})
        intact = array(Tensor("", "uint8", (WEIGHTS,)), weights)
        read, written = ([(addresses[t.name], inside[t.name], t.nbytes) for t in ends] for ends in (inputs, outputs))

        def begin() -> None:
            memory.fill(base, size)
            for outside, own, nbytes in read:
                memory.move(own, outside, nbytes)
            for outside, _, nbytes in written:
                memory.fill(outside, nbytes)

        def compute() -> None:
            if (intact == WEIGHT).all():
                with contextlib.suppress(TurbochainError):  # of nonsense a GPU makes nonsense
                    run()

        def end() -> None:
            for outside, own, nbytes in written:
                memory.move(outside, own, nbytes)

        reads, writes = ([(outside, nbytes) for outside, _, nbytes in spans] for spans in (read, written))
        scratch = [(base, size)] if size else []
        return [
            (begin, (*reads, *writes, *scratch)),
            (compute, ((weights, WEIGHTS), *scratch)),
            (end, (*writes, *scratch)),
        ]


WEIGHT = np.random.default_rng(5).integers(0, 256, WEIGHTS, np.uint8)


def load(name: str, opened: Opened) -> CpuGraph:
    """Load a graph on ONNX Runtime's CPU provider, as the CPU backend does."""
    return _load(name, opened.bundle.path, opened.folder)


@functools.cache  # it is not what is tested, and its kernels run one at a time
def _load(name: str, path: Path, folder: Path) -> CpuGraph:
    return onnxruntime.OnnxRuntimeCpu(Opened(Bundle.open(path), folder, {}, Device("cpu"))).load_graph(name)


def array(tensor: Tensor, address: int) -> np.ndarray:
    """The memory at an address as an array."""
    raw = (ctypes.c_char * tensor.nbytes).from_address(address)
    return np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)


def _destroy(runtime: Runtime, module: Module, blocks: list[int]) -> None:
    module.unload()
    for block in blocks:
        runtime.cudaFree(block)
