"""The functions of the CUDA runtime that `cuda.py` calls, with the same arguments and results as cuda-bindings'."""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

from cuda.bindings import runtime as real

from . import memory
from .graphs import Capture, Executable, Graph, Kind, Node
from .memory import Block, Memory
from .streams import Event, Record, Run, Scheduler, Span, Stream, Task, Wait

Error = real.cudaError_t
STICKY = (Error.cudaErrorIllegalAddress, Error.cudaErrorLaunchFailure)
"""After one of these every call of the process fails."""


class Refused(Exception):
    """A call fails with a status."""

    def __init__(self, status: Error) -> None:
        super().__init__(status)
        self.status = status


def function(results: int = 0, *, unsafe: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of the CUDA runtime that may fail; `unsafe`: it must not be called during a capture."""

    def wrap(body: Callable[..., Any]) -> Callable[..., Any]:
        name = body.__name__

        @functools.wraps(body)
        def called(self: "Runtime", *arguments: Any) -> tuple[Any, ...]:
            with self.lock:
                try:
                    self._enter(name, arguments)
                    if unsafe:
                        self._refuse_in_capture()
                    made = body(self, *arguments)
                    self.scheduler.meanwhile()
                except Refused as refused:
                    self.last = refused.status
                    return (refused.status, *[None] * results)
                return (Error.cudaSuccess, *(made if results > 1 else [made] * results))

        return called

    return wrap


class Module:
    """Kernels that a library has loaded onto a GPU, as a TensorRT engine or a session of ONNX Runtime is."""

    def __init__(self, runtime: "Runtime", device: int) -> None:
        self.runtime, self.device = runtime, device
        runtime.modules.append(self)

    def launch(self, stream: Any, run: Callable[[], None], uses: Iterable[Span]) -> None:
        """Put a kernel on a stream, by its handle; `uses`: the memory that it reads or writes."""
        self.runtime.launch(stream, Task(run, tuple(uses), self))

    def unload(self) -> None:
        """Take the kernels away."""
        self.runtime.unload(self)


class Runtime:
    """The driver and the runtime of a machine with GPUs, in place of the module `cuda.bindings.runtime`."""

    cudaGraphNodeType = real.cudaGraphNodeType
    cudaMemoryType = real.cudaMemoryType
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking
    cudaEventDefault = real.cudaEventDefault
    cudaEventDisableTiming = real.cudaEventDisableTiming

    def __init__(self, seed: int = 0, *, gpus: int = 2, total: int = 2**33) -> None:
        """`seed`: of the order of the work. `total`: bytes of each GPU."""
        self.lock = threading.RLock()
        self.memory, self.scheduler = Memory(), Scheduler(seed)
        self.scheduler.refuse, self.scheduler.failed = self._wrong, self._fault
        self.gpus, self.total = gpus, total
        self.misuse: list[str] = []
        self.calls: list[str] = []
        self.fail: dict[int | str, Error] = {}  # a call, by its number or once by its name → what becomes of it
        self.last = Error.cudaSuccess
        self.sticky: Error | None = None
        self.modules: list[Module] = []
        self.graphs: list[Graph | Executable] = []
        self.events: list[Event] = []
        self.lost: list[object] = []  # what a call was to free that was made to fail
        self._captures: list[Capture] = []
        self._thread = threading.local()
        self._numbers = iter(range(0x1000, 2**62, 16))

    # What tests ask for.

    def leaked(self) -> list[str]:
        """What was made and not given back."""
        left = [*self.memory.live, *self.scheduler.streams, *self.events, *self.graphs, *self.modules]
        kept = [thing for thing in left if thing not in self.lost]
        return [f"a block of {x.size} bytes" if isinstance(x, Block) else type(x).__name__ for x in kept]

    def problems(self) -> list[str]:
        """Everything that must not have happened."""
        return [*self.misuse, *self.memory.damage()]

    # What libraries do.

    def launch(self, stream: Any, task: Task) -> None:
        """Put a kernel or a copy on a stream."""
        with self.lock:
            self._enter("launch", ())
            found = self._stream(stream)
            if found.device != self._device():
                self.misuse.append(f"a kernel for GPU {found.device} was launched while {self._device()} was current")
                raise Refused(Error.cudaErrorInvalidResourceHandle)
            self._put(found, task, Node(Kind.cudaGraphNodeTypeKernel, frozenset(), task))
            self.scheduler.meanwhile()

    def host_function(self, stream: Any, run: Callable[[], None]) -> None:
        """Let a function of the host be called when a stream comes to it."""
        with self.lock:
            task = Task(run, ())
            self._put(self._stream(stream), task, Node(Kind.cudaGraphNodeTypeHost, frozenset(), task))

    def other_node(self, stream: Any, kind: Kind) -> None:
        """Put something of another kind into what a stream is being captured into."""
        with self.lock:
            self._put(self._stream(stream), Task(lambda: None, ()), Node(kind, frozenset()))

    def unload(self, module: Module) -> None:
        """Take a module's kernels away."""
        with self.lock:
            self.modules.remove(module)
            if self.sticky:
                self.misuse.append("a library's object was destroyed after a fault: it aborts the process")
            if any(task.owner is module for task in self._launchable()):
                self.misuse.append("a stage was destroyed before the graph that runs it")
            if any(task.owner is module for task in self._waiting()):
                self.misuse.append("a stage was destroyed before its work was done")

    # The state of a thread and of the machine.

    def _device(self) -> int:
        return getattr(self._thread, "device", 0)

    def _enter(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append(name)
        status = self.sticky or self.fail.get(len(self.calls) - 1) or self.fail.pop(name, None)
        if status is None:
            return
        if "Destroy" in name or "Free" in name:
            self.lost += [self.memory.find(a) if isinstance(a, int) else a for a in arguments[:1]]
        if name == "cudaStreamEndCapture":
            self._end(arguments[0])
        if status in STICKY:
            self.sticky = status
        raise Refused(status)

    def _capturing(self) -> Capture | None:
        """The capture that the calling thread has begun."""
        thread = threading.get_ident()
        return next((c for c in self._captures if c.thread == thread), None)

    def _refuse_in_capture(self) -> None:
        if capture := self._capturing():
            self._invalidate(capture, Error.cudaErrorStreamCaptureUnsupported)

    def _invalidate(self, capture: Capture, status: Error) -> None:
        capture.valid = False
        raise Refused(status)

    def _fault(self, reason: str) -> None:
        """A kernel has gone wrong: from now on nothing works."""
        self.misuse.append(reason)
        self.sticky = Error.cudaErrorIllegalAddress

    def _wrong(self, task: Task) -> str | None:
        """Why a task cannot be done."""
        if task.owner is not None and task.owner not in self.modules:
            return "a kernel ran after its stage was destroyed"
        for address, size in task.uses:
            if wrong := self.memory.wrong(address, size):
                return f"a kernel used {wrong}"
            device = self.memory.find(address).device  # type: ignore[union-attr]
            if isinstance(task.owner, Module) and device not in (None, task.owner.device):
                return "a kernel used memory of another GPU"
        return None

    def _waiting(self) -> list[Task]:
        """What is on the streams."""
        found: list[Task] = []
        for _, work in self.scheduler.pending():
            if isinstance(work, Task):
                found.append(work)
            elif isinstance(work, Run):
                found += [task for node in work.waiting if (task := work.tasks[node]) is not None]
        return found

    def _launchable(self) -> list[Task]:
        """What graphs hold that can be launched."""
        return [task for g in self.graphs if isinstance(g, Executable) and g not in self.lost for task in g.tasks()]

    def _stream(self, stream: Any) -> Stream:
        for known in self.scheduler.streams:
            if known.number == int(stream):
                return known
        raise Refused(Error.cudaErrorInvalidResourceHandle)

    def _put(self, stream: Stream, task: Task, node: Node) -> None:
        capture = stream.capture
        if isinstance(capture, Capture):
            if not capture.valid:
                raise Refused(Error.cudaErrorStreamCaptureInvalidated)
            node.after = capture.ends[stream]
            capture.add(stream, node)
        else:
            stream.queue.append(task)

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
        if any(isinstance(work, Run) and work.graph is graph for _, work in self.scheduler.pending()):
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
            found.queue.append(Run(graph, waiting, tasks, {node: self.scheduler.pace() for node in nodes}))

    @function(2)
    def cudaGraphGetNodes(self, graph: Graph, count: int) -> tuple[list[Node], int]:
        return graph.nodes[:count], len(graph.nodes)

    @function(1)
    def cudaGraphNodeGetType(self, node: Node) -> Kind:
        return node.kind

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
