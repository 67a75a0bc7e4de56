"""The machine: what GPUs, driver and libraries hold, and what they are never to be asked for."""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

from cuda.bindings import runtime as real

from .graphs import Capture, Executable, Graph, Kind, Node
from .memory import Block, Memory
from .streams import Event, GraphLaunch, Scheduler, Span, Stream, Task

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
        def called(self: "Machine", *arguments: Any) -> tuple[Any, ...]:
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

    def __init__(self, machine: "Machine", device: int) -> None:
        self.machine, self.device = machine, device
        machine.modules.append(self)

    def launch(self, stream: Any, run: Callable[[], None], uses: Iterable[Span]) -> None:
        """Put a kernel on a stream, by its handle; `uses`: the memory that it reads or writes."""
        self.machine.launch(stream, Task(run, tuple(uses), self))

    def unload(self) -> None:
        """Take the kernels away."""
        self.machine.unload(self)


class Machine:
    """A machine with GPUs, and what of it tests and libraries ask for; `Runtime` has the functions of CUDA."""

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

    def other_node(self, stream: Any, kind: Any) -> None:
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
            elif isinstance(work, GraphLaunch):
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
