"""The functions of the CUDA runtime that `cuda.py` calls, with the same arguments and results as cuda-bindings'."""

import functools
import threading
from typing import Any

from cuda.bindings import runtime as real

from . import memory
from .graphs import Capture, Executable, Graph, Kind, Node
from .machine import Error, Machine, Refused, function
from .streams import Event, GraphLaunch, Record, Stream, Task, Wait


class Runtime(Machine):
    """The driver and the runtime of a machine with GPUs, in place of the module `cuda.bindings.runtime`."""

    cudaGraphNodeType = real.cudaGraphNodeType
    cudaMemoryType = real.cudaMemoryType
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaEventDefault = real.cudaEventDefault
    cudaEventDisableTiming = real.cudaEventDisableTiming

    # Errors and devices.

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return real.cudaGetErrorString(error)

    def cudaGetLastError(self) -> tuple[Error]:
        last, self.last = self.sticky or self.last, Error.cudaSuccess
        return (last,)

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 13000

    @function(1)
    def cudaGetDeviceCount(self) -> int:
        return self.gpus

    @function(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        properties = real.cudaDeviceProp()
        properties.name = b"Stand-in".ljust(256, b"\0")
        properties.major, properties.minor, properties.totalGlobalMem = 9, 0, self.total
        return properties

    @function(1)
    def cudaGetDevice(self) -> int:
        return self._device()

    @function()
    def cudaSetDevice(self, device: int) -> None:
        if not 0 <= device < self.gpus:
            raise Refused(Error.cudaErrorInvalidDevice)
        self._thread.device = device

    # Memory.

    def _free_bytes(self) -> int:
        return self.total - sum(block.size for block in self.memory.live if block.device == self._device())

    @function(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self._free_bytes(), self.total

    @function(1, unsafe=True)
    def cudaMalloc(self, size: int) -> int:
        if size > self._free_bytes():
            raise Refused(Error.cudaErrorMemoryAllocation)
        return self.memory.allocate(size, self._device()).address

    @function(1, unsafe=True)
    def cudaMallocHost(self, size: int) -> int:
        return self.memory.allocate(size, None).address

    @function(unsafe=True)
    def cudaFree(self, address: int) -> None:
        self._free(address, host=False)

    @function(unsafe=True)
    def cudaFreeHost(self, address: int) -> None:
        self._free(address, host=True)

    def _free(self, address: int, host: bool) -> None:
        if address == 0:
            return
        block = self.memory.find(address)
        if block is None or block.freed or block.address != address or (block.device is None) != host:
            self.misuse.append("something was freed that is not a block")
            raise Refused(Error.cudaErrorInvalidValue)
        for what, tasks in (("work that waits", self._waiting()), ("a graph", self._launchable())):
            if any(self.memory.find(at) is block for task in tasks for at, _ in task.uses):
                self.misuse.append(f"a block of {block.size} bytes was freed before {what} that uses it")
        self.memory.free(block)

    @function(1)
    def cudaPointerGetAttributes(self, address: int) -> Any:
        block, kinds = self.memory.find(address), real.cudaMemoryType
        attributes = real.cudaPointerAttributes()
        attributes.type = kinds.cudaMemoryTypeUnregistered
        if block is not None and not block.freed:
            attributes.type = kinds.cudaMemoryTypeHost if block.device is None else kinds.cudaMemoryTypeDevice
        return attributes

    @function()
    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> None:
        found = self._stream(stream)
        if kind != real.cudaMemcpyKind.cudaMemcpyDefault:
            raise Refused(Error.cudaErrorInvalidValue)
        uses = []
        for address in (target, source):
            if self.memory.find(address) is None:  # memory that is not page-locked
                if isinstance(found.capture, Capture):
                    self._invalidate(found.capture, Error.cudaErrorStreamCaptureUnsupported)
            elif wrong := self.memory.wrong(address, size):
                self.misuse.append(f"a copy of {wrong}")
                raise Refused(Error.cudaErrorInvalidValue)
            else:
                uses.append((address, size))
        task = Task(functools.partial(memory.move, target, source, size), tuple(uses))
        self._put(found, task, Node(Kind.cudaGraphNodeTypeMemcpy, frozenset(), task, (source, target)))

    # Streams and events.

    @function(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> Stream:
        if flags != real.cudaStreamNonBlocking:
            self.misuse.append("a stream waits for the default stream")
        made = Stream(next(self._numbers), self._device(), self.scheduler.pace())
        self.scheduler.streams.append(made)
        return made

    @function()
    def cudaStreamDestroy(self, stream: Stream) -> None:
        if self._stream(stream).queue:
            self.misuse.append("a stream was destroyed before its work was done")
        self.scheduler.streams.remove(stream)

    @function()
    def cudaStreamSynchronize(self, stream: Any) -> None:
        found = self._stream(stream)
        if isinstance(found.capture, Capture):
            self._invalidate(found.capture, Error.cudaErrorStreamCaptureUnsupported)
        self.scheduler.drain(found)
        if self.sticky:
            raise Refused(self.sticky)

    @function(1)
    def cudaEventCreateWithFlags(self, flags: int) -> Event:
        made = Event(self._device(), flags != real.cudaEventDisableTiming)
        self.events.append(made)
        return made

    @function()
    def cudaEventDestroy(self, event: Event) -> None:
        self.events.remove(event)

    @function()
    def cudaEventRecord(self, event: Event, stream: Any) -> None:
        found = self._stream(stream)
        if event not in self.events or event.device != found.device:
            raise Refused(Error.cudaErrorInvalidResourceHandle)
        if isinstance(found.capture, Capture):
            if not found.capture.valid:
                raise Refused(Error.cudaErrorStreamCaptureInvalidated)
            event.captured, event.nodes = found.capture, frozenset(found.capture.ends[found])
        else:
            event.captured = None
            event.recorded += 1
            found.queue.append(Record(event, event.recorded))

    @function()
    def cudaStreamWaitEvent(self, stream: Any, event: Event, flags: int) -> None:
        found, capture = self._stream(stream), event.captured
        if event not in self.events or flags:
            raise Refused(Error.cudaErrorInvalidResourceHandle)
        if isinstance(found.capture, Capture) and capture is not found.capture:
            outside = capture is None
            self._invalidate(
                found.capture, Error.cudaErrorStreamCaptureIsolation if outside else Error.cudaErrorStreamCaptureMerge
            )
        if not isinstance(capture, Capture):
            found.queue.append(Wait(event, event.recorded))
            return
        if capture not in self._captures:  # it has ended, and the event stands for nothing that ever happens
            raise Refused(Error.cudaErrorCapturedEvent)
        if not capture.valid:
            raise Refused(Error.cudaErrorStreamCaptureInvalidated)
        found.capture = capture
        capture.ends[found] = capture.ends.get(found, frozenset()) | event.nodes  # type: ignore[operator]

    @function(1)
    def cudaEventElapsedTime(self, start: Event, end: Event) -> float:
        if start.captured or end.captured:
            raise Refused(Error.cudaErrorCapturedEvent)
        if not (start.timing and end.timing and start.recorded and end.recorded):
            raise Refused(Error.cudaErrorInvalidResourceHandle)
        if start.done < start.recorded or end.done < end.recorded:
            raise Refused(Error.cudaErrorNotReady)
        return 1e-3 * (end.time - start.time)  # a microsecond for each piece of work

    # Captures and graphs.

    @function()
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        found = self._stream(stream)
        if mode != real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            self.misuse.append("a capture forbids other threads what they must be free to do")
        if found.capture is not None:
            raise Refused(Error.cudaErrorIllegalState)
        found.capture = Capture(found, threading.get_ident(), ends={found: frozenset()})
        self._captures.append(found.capture)

    @function(1)
    def cudaStreamEndCapture(self, stream: Any) -> Graph:
        capture = self._stream(stream).capture
        if not isinstance(capture, Capture):
            raise Refused(Error.cudaErrorIllegalState)
        if capture.origin.number != int(stream):
            self._invalidate(capture, Error.cudaErrorStreamCaptureUnmatched)
        if capture.thread != threading.get_ident():
            self._invalidate(capture, Error.cudaErrorStreamCaptureWrongThread)
        self._end(stream)
        if not capture.valid:
            raise Refused(Error.cudaErrorStreamCaptureInvalidated)
        if capture.unjoined():
            raise Refused(Error.cudaErrorStreamCaptureUnjoined)
        made = Graph(capture.nodes, capture.origin.device)
        self.graphs.append(made)
        return made

    def _end(self, stream: Any) -> None:
        """Let the streams of a capture be as they were before it."""
        capture = self._stream(stream).capture
        if isinstance(capture, Capture):
            self._captures.remove(capture)
            for captured in capture.ends:
                captured.capture = None

    @function()
    def cudaGraphDestroy(self, graph: Graph) -> None:
        self.graphs.remove(graph)

    @function(1)
    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Executable:
        made = Executable(graph)
        self.graphs.append(made)
        return made

    @function()
    def cudaGraphExecDestroy(self, graph: Executable) -> None:
        if any(isinstance(work, GraphLaunch) and work.graph is graph for _, work in self.scheduler.pending()):
            self.misuse.append("a graph was destroyed before its work was done")
        self.graphs.remove(graph)

    @function()
    def cudaGraphLaunch(self, graph: Executable, stream: Any) -> None:
        found = self._stream(stream)
        if graph not in self.graphs:
            raise Refused(Error.cudaErrorInvalidValue)
        if found.device != graph.graph.device or found.device != self._device():
            self.misuse.append("a graph was launched on another GPU than its own")
            raise Refused(Error.cudaErrorInvalidResourceHandle)
        if isinstance(found.capture, Capture):
            node = Node(Kind.cudaGraphNodeTypeGraph, found.capture.ends[found], child=graph.graph)
            found.capture.add(found, node)
            return
        nodes = graph.graph.flat()
        waiting = {node: {*after} for node, (after, _) in nodes.items()}
        tasks = {node: task for node, (_, task) in nodes.items()}
        if waiting:
            found.queue.append(GraphLaunch(graph, waiting, tasks, {node: self.scheduler.pace() for node in nodes}))

    @function(2)
    def cudaGraphGetNodes(self, graph: Graph, count: int) -> tuple[list[Node], int]:
        return graph.nodes[:count], len(graph.nodes)

    @function(1)
    def cudaGraphNodeGetType(self, node: Node) -> Kind:
        return Kind(node.kind)  # ValueError for one that the bindings do not know, as they have it

    @function(1)
    def cudaGraphChildGraphNodeGetGraph(self, node: Node) -> Graph | None:
        return node.child

    @function(1)
    def cudaGraphMemcpyNodeGetParams(self, node: Node) -> Any:
        params = real.cudaMemcpy3DParms()
        for name, address in zip(("srcPtr", "dstPtr"), node.copied, strict=True):
            pitched = real.cudaPitchedPtr()
            pitched.ptr = address
            setattr(params, name, pitched)
        return params
