"""The executor that the backends on an NVIDIA GPU share: buffers, and one CUDA graph for each plan."""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Cancel, Observe, Opened, Results, others_of_same_weights, stop_if
from turbochain.runtime.backends.gpu_buffers import Buffers
from turbochain.runtime.chain.plan import Plan
from turbochain.runtime.chain.recording import (
    Launch,
    OnDevice,
    Recording,
    ToDevice,
    Together,
    ToHost,
    record,
    scratch,
)
from turbochain.runtime.errors import CudaFault, InputError, OutOfMemory, TurbochainError

log = logging.getLogger("turbochain")

Arrays = Mapping[str, np.ndarray]


class GpuGraph(ABC):
    """A graph that is loaded."""

    scratch_bytes = 0
    """GPU memory that a launch needs besides its inputs and outputs; other graphs may use it between launches."""

    def place(self, address: int, size: int) -> None:  # noqa: B027 (a graph without scratch memory does nothing)
        """Set where the scratch memory is."""

    def check_capturable(self, stream: Any) -> None:  # noqa: B027 (most can be captured)
        """Raise TurbochainError if the library says that a launch on this stream cannot be captured."""

    @abstractmethod
    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """Put one launch on a stream; `addresses`: where each input and output is. TurbochainError on failure."""


@dataclass
class _Program:
    """A plan that is ready to run."""

    name: str  # what it runs
    graphs: tuple[str, ...]
    recording: Recording
    addresses: dict[str, int]  # buffer → where it is on the GPU
    host: dict[str, np.ndarray]  # buffer that is uploaded or downloaded → its page-locked copy
    graph: Any = None  # the captured plan; None if it could not be captured
    uncaptured: str | None = None  # why not
    try_again: bool = False  # whether it could at another time


class GpuExecutor(ABC):
    """An `Executor` for which a whole plan is one launch: uploads, every graph, copies and downloads.

    A plan is captured when it first runs, and again if `most_plans` others have run since. If it cannot be captured,
    the same actions go on the stream one by one, a warning says so, and the results hold the reason. After a CudaFault
    every call raises it again.
    """

    concurrent = True  # whether a graph may be put on another stream than the executor's
    most_plans = 16  # that are kept ready, the ones used last: a captured one takes memory for each of its launches

    def __init__(self, opened: Opened) -> None:
        """Take the GPU; raises NoGpu, OutOfMemory or CudaError, and has then given back what it took."""
        self.opened, self.device = opened, opened.device
        self._fault: str | None = None
        self._programs: OrderedDict[Plan, _Program] = OrderedDict()  # the one used last is the last
        self._graphs: dict[str, GpuGraph] = {}
        self._scratch = (0, 0)  # address and size of the graphs' shared block
        self._side: list[tuple[Any, Any, Any]] = []  # stream, fork, join
        self._events: list[tuple[Any, Any]] = []  # start, end
        self.session = cuda.Session(opened.device.index, self._graphs)
        try:
            with self.session.active():
                self.stream = self.session.stream()
                self._start, self._end = self.session.event(timing=True), self.session.event(timing=True)
            self._buffers = Buffers(self.session, self.stream)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def load_graph(self, name: str) -> GpuGraph:
        """Load a graph onto `self.session`'s GPU; TurbochainError if the backend cannot."""

    @property
    def loaded(self) -> frozenset[str]:
        """See Executor."""
        return frozenset(self._graphs)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Let the thread work on the GPU; after an error nothing is left on a stream, and a fault is known as one."""
        if self._fault:
            raise CudaFault(self._fault)
        with self.session.active():
            try:
                yield
            except BaseException as error:
                self._fault = self._find_fault(error)
                if self._fault and isinstance(error, TurbochainError) and not isinstance(error, CudaFault):
                    raise CudaFault(self._fault) from error
                raise

    def _find_fault(self, error: BaseException) -> str | None:
        """Wait for what an interrupted call has put on the streams; returns what CUDA says if no call can succeed.

        A library's own error may hide that.
        """
        try:
            self.session.synchronize()
        except CudaFault as fault:
            return str(fault)
        except TurbochainError:
            pass
        return str(error) if isinstance(error, CudaFault) else None

    def load(self, graphs: Iterable[str]) -> None:
        """See Executor."""
        wanted = dict.fromkeys(graphs)
        with self._working():
            missing = [name for name in wanted if name not in self._graphs]
            if missing and not self.opened.keep_all:
                self._unload(others_of_same_weights(self.opened.bundle.manifest.graphs, self.loaded, wanted.keys()))
            for name in missing:
                self._graphs[name] = self.load_graph(name)

    def execute(
        self, plan: Plan, feeds: Arrays, *, observe: Observe | None = None, cancel: Cancel | None = None
    ) -> Results:
        """See Executor. The downloads are page-locked arrays.

        With `observe` the graphs go on the stream one by one, each with its own timing. A plan that runs as one CUDA
        graph asks `cancel` once, before the launch; its constants are read when it is new.
        """
        with self._working():
            program = self._programs.get(plan)
            if program is None:
                program = self._prepare(plan, feeds)
            elif program.try_again:
                self._capture(program)
            self._programs.move_to_end(plan)
            self._fill(program, feeds)
            cuda.record_event(self._start, self.stream)
            timed = self._enqueue(program, observe, cancel)
            cuda.record_event(self._end, self.stream)
            cuda.synchronize(self.stream)
            for graph, start, end in timed:
                assert observe is not None
                observe(graph, cuda.elapsed(start, end))
            seconds = cuda.elapsed(self._start, self._end)
        arrays = {name: program.host[buffer] for name, buffer in program.recording.downloads.items()}
        return Results(arrays, seconds, program.uncaptured)

    def _prepare(self, plan: Plan, feeds: Arrays) -> _Program:
        """Allocate what a new plan needs, run it twice (libraries set themselves up then), and capture it."""
        recording = record(plan, self.opened.bundle.manifest.graphs)
        self._place_scratch(recording)
        constants = recording.constants
        addresses = {
            b: self._buffers.constant(constants[b], feeds) if b in constants else self._buffers.address(b, tensor)
            for b, tensor in recording.tensors.items()
        }
        crossing = (*recording.uploads, *recording.downloads.values())
        host = {b: self._buffers.host(b, recording.tensors[b]) for b in crossing}
        program = _Program(str(plan), tuple(plan.graphs), recording, addresses, host)
        self._fill(program, feeds)
        for _ in range(2):  # ONNX Runtime still allocates in the second run
            self._walk(program, without=recording.kept)  # else a stream would be two pictures on
            cuda.synchronize(self.stream)
        self._capture(program)
        self._programs[plan] = program
        self._forget([*self._programs][: -self.most_plans])
        return program

    def _capture(self, program: _Program) -> None:
        """Make one CUDA graph of a program; if that fails, the program says why, and whether to try again."""
        try:
            for name in program.graphs:
                self._graphs[name].check_capturable(self.stream)
            program.graph = self.session.capture(self.stream, lambda: self._walk(program), self.check_captured)
        except TurbochainError as error:
            if self._find_fault(error):
                raise
            reason = str(error)  # an error that is kept holds what it passed through
            if reason != program.uncaptured:
                log.warning("%s runs graph by graph, because it is not captured as one: %s", program.name, reason)
            program.uncaptured, program.try_again = reason, isinstance(error, OutOfMemory)
        else:
            program.uncaptured, program.try_again = None, False

    def check_captured(self, graph: Any) -> None:  # noqa: B027 (most may be launched)
        """Raise TurbochainError if a captured graph must not be launched."""

    def host_buffers(self) -> Iterable[np.ndarray]:
        """Return the page-locked arrays."""
        return self._buffers.page_locked.values()

    def _place_scratch(self, recording: Recording) -> None:
        """Give the loaded graphs one block that suffices for this plan too; programs with other addresses go."""
        sizes = {name: graph.scratch_bytes for name, graph in self._graphs.items()}
        actions = [a for r in (*(p.recording for p in self._programs.values()), recording) for a in r.actions]
        offsets, total = scratch(actions if self.concurrent else (), sizes)
        if total > self._scratch[1]:
            self._forget(list(self._programs))
            (old, size), self._scratch = self._scratch, (0, 0)
            if size:
                self.session.free(old)
            self._scratch = (self.session.allocate(total, "the graphs' scratch memory"), total)
        for name, graph in self._graphs.items():
            graph.place(self._scratch[0] + offsets[name], graph.scratch_bytes)

    def _forget(self, plans: Iterable[Plan]) -> None:
        """Give back the captured graphs of these plans."""
        for plan in plans:
            program = self._programs.pop(plan)
            if program.graph is not None:
                self.session.destroy(program.graph)

    def hold(self, plan: Plan, values: Arrays) -> None:
        """See Executor."""
        tensors = plan.tensors(self.opened.bundle.manifest.graphs)
        with self._working():
            for name, value in values.items():
                address = self._buffers.address(name, tensors[name])
                self._buffers.upload(np.ascontiguousarray(value, tensors[name].dtype), address)

    def _fill(self, program: _Program, feeds: Arrays) -> None:
        for buffer, (name, row) in program.recording.uploads.items():
            np.copyto(program.host[buffer], feeds[name] if row is None else feeds[name][row])

    def _enqueue(self, program: _Program, observe: Observe | None, cancel: Cancel | None) -> list[tuple[str, Any, Any]]:
        timed: list[tuple[str, Any, Any]] = []
        stop_if(cancel)
        if observe is not None:
            self._walk(program, timed, cancel)
        elif program.graph is not None:
            cuda.launch(program.graph, self.stream)
        else:
            self._walk(program, cancel=cancel)
        return timed

    def _walk(
        self,
        program: _Program,
        timed: list[tuple[str, Any, Any]] | None = None,
        cancel: Cancel | None = None,
        without: Collection[str] = (),
    ) -> None:
        """Put every action on the stream; with `timed`, no two launches at once, and events around each.

        Nothing is copied into the buffers `without`.
        """
        at, host = program.addresses, program.host
        for action in program.recording.actions:
            match action:
                case ToDevice(buffer):
                    cuda.copy(at[buffer], host[buffer].ctypes.data, host[buffer].nbytes, self.stream)
                case ToHost(buffer):
                    cuda.copy(host[buffer].ctypes.data, at[buffer], host[buffer].nbytes, self.stream)
                case OnDevice(_, target) if target in without:
                    pass
                case OnDevice(source, target):
                    cuda.copy(at[target], at[source], program.recording.tensors[source].nbytes, self.stream)
                case Together(launches):
                    stop_if(cancel)
                    if timed is None:
                        self._branch(launches, at)
                    else:
                        self._timed(launches, at, timed)

    def _timed(self, launches: Sequence[Launch], at: Mapping[str, int], timed: list[tuple[str, Any, Any]]) -> None:
        for launch in launches:
            start, end = self._timers(len(timed))
            cuda.record_event(start, self.stream)
            self._launch(launch, at, self.stream)
            cuda.record_event(end, self.stream)
            timed.append((launch.graph, start, end))

    def _timers(self, index: int) -> tuple[Any, Any]:
        """Return the events around the launch of this number; they are kept for the next time."""
        if index == len(self._events):
            self._events.append((self.session.event(timing=True), self.session.event(timing=True)))
        return self._events[index]

    def _branch(self, launches: Sequence[Launch], at: Mapping[str, int]) -> None:
        """Put the first launch on the stream itself, each other one on a side stream that leaves it and comes back."""
        others = launches[1:] if self.concurrent else ()
        for i, launch in enumerate(others):
            if i == len(self._side):
                self._side.append((self.session.stream(), self.session.event(), self.session.event()))
            stream, fork, join = self._side[i]
            cuda.record_event(fork, self.stream)
            cuda.wait_event(stream, fork)
            self._launch(launch, at, stream)
            cuda.record_event(join, stream)
        for launch in launches if not self.concurrent else launches[:1]:
            self._launch(launch, at, self.stream)
        for _, _, join in self._side[: len(others)]:
            cuda.wait_event(self.stream, join)

    def _launch(self, launch: Launch, at: Mapping[str, int], stream: Any) -> None:
        self._graphs[launch.graph].enqueue({name: at[buffer] for name, buffer in launch.buffers.items()}, stream)

    def can_patch(self, name: str) -> bool:
        """See Executor."""
        return False

    def patch(self, name: str, values: Arrays) -> None:
        """See Executor."""
        raise InputError(f"the weights of {name} cannot be changed here: onnxruntime does that on a CPU, in fp32")

    def operators(self, name: str) -> Iterable[tuple[str, float]]:
        """See Executor."""
        raise InputError("operators are profiled on a CPU only: on a GPU, run turbochain bench under nsys")

    def unload(self, name: str) -> None:
        """See Executor."""
        with self._working():
            self._unload([name])

    def _unload(self, graphs: Iterable[str]) -> None:
        for graph in graphs:
            self.session.synchronize()
            self._forget([plan for plan in self._programs if graph in plan.graphs])
            del self._graphs[graph]

    def close(self) -> None:
        """See Executor. After a CudaFault the graphs' memory is kept, because freeing it would end the process."""
        self.session.close()
        self._programs.clear()
