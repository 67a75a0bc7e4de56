"""CUDA through `cuda-bindings`: a device, its memory, streams, events and graphs.

The one place where a CUDA status becomes an exception: `NoGpu` if there is nothing to work on, `OutOfMemory`
if the caller can go on with less, `CudaFault` if the process must restart, `CudaError` for the rest.
"""

import ctypes
import functools
import importlib
import math
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turbochain.runtime.backends import forks, garbage
from turbochain.runtime.bundle.manifest import Gpu
from turbochain.runtime.errors import (
    BackendMissing,
    CudaError,
    CudaFault,
    InputError,
    NoGpu,
    OutOfMemory,
    TurbochainError,
)

ALIGNMENT = 256  # bytes: what every address that a kernel reads or writes is a multiple of

_OUT_OF_MEMORY, _INSUFFICIENT_DRIVER, _NO_DEVICE = 2, 35, 100
_CAPTURE = range(900, 909)  # what a stream that is being captured refuses


@functools.cache
def _runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        raise BackendMissing("cuda-bindings is not installed: pip install 'turbochain[tensorrt]'") from None


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime: its values without the status (None, one, or a tuple).

    Raises NoGpu, OutOfMemory, CudaFault or CudaError if the status is not success.
    """
    called = getattr(_runtime(), function)
    try:
        status, *values = called(*arguments)
    except ValueError as error:  # of an enumeration
        raise CudaError(
            f"{function} gives what this cuda-bindings does not know, because the driver is newer: {error}; "
            "pip install --upgrade cuda-bindings"
        ) from None
    if int(status):
        raise _error(function, status)
    return tuple(values) if len(values) > 1 else (values[0] if values else None)


def _error(function: str, status: Any) -> Exception:
    runtime = _runtime()
    if int(status) in (_INSUFFICIENT_DRIVER, _NO_DEVICE):
        return _no_gpu(int(status))
    text = runtime.cudaGetErrorString(status)[1]
    what = f"{function} failed: {text.decode()} ({status.name})"
    runtime.cudaGetLastError()  # forget it, or the next call of another library reports it as its own
    if int(status) == _OUT_OF_MEMORY:
        return OutOfMemory(f"the GPU is out of memory: {what}")
    if int(status) not in _CAPTURE and _fault() == int(status):
        return CudaFault(f"the GPU cannot be used by this process any more; restart it: {what}")
    return CudaError(what)


def _fault() -> int:
    """Return the status that every call has now, or 0: a call may also report once what another one has done."""
    first, second = (int(_runtime().cudaFree(0)[0]) for _ in range(2))  # which never fails in a healthy process
    return first if first == second else 0


def _no_gpu(status: int) -> NoGpu:
    _, driver = _runtime().cudaDriverGetVersion()
    _, needed = _runtime().cudaRuntimeGetVersion()
    if not driver:
        return NoGpu("there is no NVIDIA driver on this machine: install one, or use a backend for the CPU")
    if status == _INSUFFICIENT_DRIVER:
        return NoGpu(
            f"the NVIDIA driver is too old: it serves CUDA {driver // 1000}.{driver % 1000 // 10}, and the installed "
            f"cuda-bindings needs CUDA {needed // 1000}; update the driver, or pip install "
            f"'cuda-bindings<{driver // 1000 + 1}'"
        )
    return NoGpu("the NVIDIA driver sees no GPU: check CUDA_VISIBLE_DEVICES, or use a backend for the CPU")


def find(name: str | None) -> tuple[int, Gpu]:
    """Return a GPU's ordinal and description: "cuda" or None is the first one, "cuda:1" the second.

    Raises InputError for another name, NoGpu if there is none of that number.
    """
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name or "cuda")
    if not match:
        raise InputError(f"device={name!r}: cuda, or cuda:N for the GPU of number N, was expected")
    index, count = int(match[1] or 0), _count()
    if index >= count:
        raise NoGpu(f"device={name!r}: this machine has {count} GPU{'s' * (count != 1)}, numbered from 0")
    properties = call("cudaGetDeviceProperties", index)
    return index, Gpu(
        name=properties.name.decode().rstrip("\0"),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
    )


def _count() -> int:
    try:
        return call("cudaGetDeviceCount")
    except (CudaError, CudaFault, OutOfMemory) as error:  # such as a service of the driver that is not running
        way_out = "mend it, or use a backend for the CPU"
        raise NoGpu(f"the NVIDIA driver gives no access to a GPU; {way_out}: {error}") from None


@dataclass
class _Owned:
    """What a session has made on its GPU."""

    index: int  # the GPU's CUDA ordinal
    users: dict[str, Any]  # what libraries have loaded
    process: int = field(default_factory=os.getpid)
    streams: list[Any] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)
    others: list[tuple[str, Any]] = field(default_factory=list)  # the function that frees it, and what it is

    def close(self) -> None:
        """Give everything back: the graphs, the users, then the rest, last made first."""
        if os.getpid() != self.process:  # the GPU and the libraries' threads are the other process's
            forks.keep_for_ever(self)
            return
        runtime = _runtime()
        # A status is of no use: after a fault every call fails, and the memory is gone with the process.
        with _restored():
            runtime.cudaSetDevice(self.index)
            for stream in self.streams:
                runtime.cudaStreamSynchronize(stream)
            for graph in self.graphs:
                runtime.cudaGraphExecDestroy(graph)
            if _fault():  # after which ONNX Runtime's destructors end the process
                forks.keep_for_ever(dict(self.users))
            self.users.clear()
            for free, value in reversed(self.others):
                getattr(runtime, free)(value)
            runtime.cudaGetLastError()


@contextmanager
def _restored() -> Iterator[None]:
    """Leave the calling thread on the GPU that it is on now.

    CUDA prepares that GPU if nothing has yet, which takes some of its memory; there is no other way to be back on it.
    """
    runtime = _runtime()
    status, before = runtime.cudaGetDevice()
    try:
        yield
    finally:
        if not int(status):
            runtime.cudaSetDevice(before)


class Session:
    """One GPU and everything that was made on it.

    `close` gives all of it back. A session that is dropped without `close` does the same; when the process ends, the
    driver does it.
    """

    def __init__(self, index: int, users: dict[str, Any] | None = None) -> None:
        """Take the GPU of the CUDA ordinal `index`; raises what `call` raises.

        `users`: what libraries load onto the GPU. It is given up after the graphs that run it and before the streams
        and the memory that it uses; after a fault never, because that would end the process.
        """
        self.index = index
        self._owned = _Owned(index, {} if users is None else users)
        self._finalizer = weakref.finalize(self, self._owned.close)
        self._finalizer.atexit = False
        with self.active():
            pass  # an error comes now

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let this GPU be the calling thread's for a while, as every call for it needs."""
        with _restored():
            call("cudaSetDevice", self.index)
            yield

    def _own(self, value: Any, free: str) -> Any:
        self._owned.others.append((free, value))
        return value

    def allocate(self, size: int, what: str) -> int:
        """Return the address of `size` bytes (at least 1) of GPU memory; OutOfMemory says what they were for."""
        try:
            return self._own(call("cudaMalloc", max(size, 1)), "cudaFree")
        except OutOfMemory:
            raise self.out_of_memory(size, what) from None

    def free(self, address: int) -> None:
        """Give back what `allocate` returned; nothing may use it any more."""
        self._owned.others.remove(("cudaFree", address))
        call("cudaFree", address)

    def out_of_memory(self, size: int, what: str) -> OutOfMemory:
        """Return the error for `size` bytes that could not be had."""
        free, total = call("cudaMemGetInfo")
        mib = 2**20
        return OutOfMemory(
            f"the GPU is out of memory: {what} needs {math.ceil(size / mib)} MiB, and {free // mib} of {total // mib} "
            "MiB are free; close what else uses the GPU, or build for a smaller --batch or --size"
        )

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return zeros in page-locked host memory, which the GPU reads and writes by itself."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            address = self._own(call("cudaMallocHost", size), "cudaFreeHost")
        except OutOfMemory:
            raise OutOfMemory(f"the machine has no {math.ceil(size / 2**20)} MiB of memory left to page-lock") from None
        array = np.frombuffer(memoryview((ctypes.c_char * size).from_address(address)), dtype).reshape(shape)
        array[...] = 0
        return array

    def stream(self) -> Any:
        """Return a stream that does not wait for the default one."""
        made = self._own(call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking), "cudaStreamDestroy")
        self._owned.streams.append(made)
        return made

    def event(self, *, timing: bool = False) -> Any:
        """Return an event; one for ordering alone is cheaper."""
        runtime = _runtime()
        flags = runtime.cudaEventDefault if timing else runtime.cudaEventDisableTiming
        return self._own(call("cudaEventCreateWithFlags", flags), "cudaEventDestroy")

    def capture(self, stream: Any, enqueue: Callable[[], None], check: Callable[[Any], None] | None = None) -> Any:
        """Return what `enqueue` puts on `stream` as an executable graph; nothing is carried out.

        Raises what `enqueue` and `check`, which is given the graph, raise, and CudaError if something cannot be
        captured; the stream is usable again in either case.
        """
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with garbage.kept():
            call("cudaStreamBeginCapture", stream, mode)
            try:
                enqueue()
            except BaseException:
                status, graph = _runtime().cudaStreamEndCapture(stream)
                if not int(status):
                    _runtime().cudaGraphDestroy(graph)
                _runtime().cudaGetLastError()
                raise
            graph = call("cudaStreamEndCapture", stream)
        try:
            if check:
                check(graph)
            made = call("cudaGraphInstantiate", graph, 0)
        finally:
            _runtime().cudaGraphDestroy(graph)
        self._owned.graphs.append(made)
        return made

    def destroy(self, graph: Any) -> None:
        """Give back what `capture` returned; it must not be running."""
        self._owned.graphs.remove(graph)
        call("cudaGraphExecDestroy", graph)

    def synchronize(self) -> None:
        """Wait until all of the session's streams are done; then raises the first error that one of them reports.

        Not for the whole GPU: that would break what another session is capturing.
        """
        errors = []
        for stream in self._owned.streams:
            try:
                synchronize(stream)
            except TurbochainError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait for the GPU and give everything back; a second call does nothing."""
        self._finalizer()


def launch(graph: Any, stream: Any) -> None:
    """Put an executable graph on a stream."""
    call("cudaGraphLaunch", graph, stream)


def refuse_host(graph: Any, addresses: Collection[int]) -> None:
    """Raise CudaError if a captured graph does more than kernels, fills, and copies on the GPU or at these addresses.

    Other memory of the host belonged to a library for one run, and may be used for something else by the next.
    """
    runtime = _runtime()
    kinds = runtime.cudaGraphNodeType
    *_, count = call("cudaGraphGetNodes", graph, 0)
    nodes, _ = call("cudaGraphGetNodes", graph, count)
    for node in nodes:
        kind = call("cudaGraphNodeGetType", node)
        if kind == kinds.cudaGraphNodeTypeGraph:
            refuse_host(call("cudaGraphChildGraphNodeGetGraph", node), addresses)
        elif kind == kinds.cudaGraphNodeTypeMemcpy:
            _refuse_foreign(call("cudaGraphMemcpyNodeGetParams", node), addresses)
        elif kind == kinds.cudaGraphNodeTypeHost:
            raise CudaError("it calls a function of the host")
        elif kind not in (kinds.cudaGraphNodeTypeKernel, kinds.cudaGraphNodeTypeMemset, kinds.cudaGraphNodeTypeEmpty):
            raise CudaError(f"it holds what cannot be looked into: {kind.name}")


def _refuse_foreign(copied: Any, addresses: Collection[int]) -> None:
    """Raise CudaError if a copy reads or writes memory of the host at another address."""
    kinds = _runtime().cudaMemoryType
    for address in (int(copied.srcPtr.ptr), int(copied.dstPtr.ptr)):
        where = call("cudaPointerGetAttributes", address).type
        if where not in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged) and address not in addresses:
            raise CudaError("it copies from or to memory of the host that is another's")


def copy(target: int, source: int, size: int, stream: Any) -> None:
    """Put a copy of `size` bytes on a stream; the two addresses say which way."""
    call("cudaMemcpyAsync", target, source, size, _runtime().cudaMemcpyKind.cudaMemcpyDefault, stream)


def record_event(event: Any, stream: Any) -> None:
    """Let the event happen when the stream has done what is on it now."""
    call("cudaEventRecord", event, stream)


def wait_event(stream: Any, event: Any) -> None:
    """Let the stream go on only when the event has happened."""
    call("cudaStreamWaitEvent", stream, event, 0)


def synchronize(stream: Any) -> None:
    """Wait until the stream has done everything that is on it."""
    call("cudaStreamSynchronize", stream)


def elapsed(start: Any, end: Any) -> float:
    """Return the seconds between two events with timing that have happened."""
    return 1e-3 * call("cudaEventElapsedTime", start, end)


def free_bytes() -> int:
    """Return the bytes of GPU memory that are free on the calling thread's device."""
    return call("cudaMemGetInfo")[0]
