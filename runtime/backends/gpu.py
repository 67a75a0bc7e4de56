"""What the backends that run on an NVIDIA GPU share: buffers, and one CUDA graph for each plan."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.backends import Device, cuda
from turbochain.runtime.backends.cpu import Observe
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import Plan, Run, plan
from turbochain.runtime.chain.recording import Launch, OnDevice, Recording, ToDevice, Together, ToHost, record, scratch
from turbochain.runtime.errors import CudaFault, TurbochainError

log = logging.getLogger("turbochain")


class Stage(ABC):
    """One loaded graph."""

    scratch_bytes = 0
    """GPU memory that a launch needs besides its inputs and outputs, and that others may use between launches."""

    def place(self, address: int, size: int) -> None:  # noqa: B027 (a stage without scratch memory does nothing)
        """Say where the scratch memory is."""

    @abstractmethod
    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """Put one launch on a stream; `addresses` says where each input and output is. TurbochainError on failure."""


@dataclass
class _Program:
    """A plan that is ready to run."""

    recording: Recording
    addresses: dict[str, int]  # buffer → where it is on the GPU
    graph: Any = None  # the captured chain; None where it could not be captured
    uncaptured: str | None = None  # why not


class DeviceExecutor(ABC):
    """The whole of a plan is one launch: uploads, every stage, copies and downloads, captured when it first runs.

    Where it cannot be captured, the same actions go on the stream one by one, a warning says so, and `uncaptured`
    holds the reason. Not safe for several threads at once: the caller holds a lock around `execute` and the
    reading of its results. After a CudaFault every call raises it again.
    """

    concurrent = True  # whether a stage may be put on another stream than the executor's

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        options: Mapping[str, Any],
        *,
        device: Device,
        threads: int | None = None,
        graphs: Sequence[str] | None = None,
    ) -> None:
        """`graphs`: load only these of the chain (None: all of it). `threads` is of no use on a GPU.

        Raises NoGpu, OutOfMemory, CudaError or TurbochainError; what was taken of the GPU is then given back.
        """
        self.bundle, self.folder, self.options, self.device = bundle, folder, dict(options), device
        self.seconds = 0.0
        """How long the GPU worked on the last `execute`, copies included."""
        self.uncaptured: str | None = None
        """Why the last plan that was carried out is not one CUDA graph; None where it is."""
        self._fault: str | None = None
        self._programs: dict[Plan, _Program] = {}
        self._stages: dict[str, Stage] = {}
        self._device_buffers: dict[str, int] = {}
        self._host_buffers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple[str, int, int], int] = {}  # column, row, of how many → where it is
        self.session = cuda.Session(device.index)
        try:
            self.stream = self.session.stream()
            self._side: list[tuple[Any, Any, Any]] = []  # stream, fork, join
            self._events: list[tuple[Any, Any]] = []  # start, end
            self._start, self._end = self.session.event(timing=True), self.session.event(timing=True)
            for name in graphs or bundle.chain.graphs:
                self._stages[name] = self.load(name)
            self._place_scratch()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def load(self, graph: str) -> Stage:
        """Load a graph onto `self.session`'s GPU."""

    def _place_scratch(self) -> None:
        chain, graphs = self.bundle.chain, self.bundle.manifest.graphs
        actions = record(plan(chain, graphs, 1), graphs).actions if self.concurrent else ()
        sizes = {name: self._stages[name].scratch_bytes if name in self._stages else 0 for name in graphs}
        offsets, total = scratch(actions, sizes)
        block = self.session.allocate(total, "the stages' scratch memory")
        for name, stage in self._stages.items():
            stage.place(block + offsets[name], stage.scratch_bytes)

    def execute(
        self, plan: Plan, feeds: Mapping[str, np.ndarray], observe: Observe | None = None
    ) -> dict[str, np.ndarray]:
        """Carry out a plan. `feeds[name]` has the buffer's shape, or [steps, *shape] where rows are named.

        Returns the downloads: page-locked arrays, valid until the next call. With `observe` the stages go on the
        stream one by one, each with its own timing. The schedule's columns are read when a plan is new: they are
        constants of the bundle.
        """
        if self._fault:
            raise CudaFault(self._fault)
        try:
            self.session.activate()
            program = self._programs.get(plan) or self._prepare(plan, feeds)
            self._fill(program.recording, feeds)
            cuda.record(self._start, self.stream)
            timed = self._enqueue(program, observe)
            cuda.record(self._end, self.stream)
            cuda.synchronize(self.stream)
        except TurbochainError as error:
            self._fault = self._find_fault(error)
            if self._fault and not isinstance(error, CudaFault):
                raise CudaFault(self._fault) from error
            raise
        self.uncaptured = program.uncaptured
        self.seconds = cuda.elapsed(self._start, self._end)
        for graph, start, end in timed:
            assert observe
            observe(graph, cuda.elapsed(start, end))
        return {name: self._host_buffers[buffer] for name, buffer in program.recording.downloads.items()}

    def _find_fault(self, error: TurbochainError) -> str | None:
        """What CUDA says where no further call can succeed: a library's own error may hide that."""
        if isinstance(error, CudaFault):
            return str(error)
        try:
            cuda.synchronize(self.stream)
        except CudaFault as fault:
            return str(fault)
        except TurbochainError:
            pass
        return None

    def _prepare(self, plan: Plan, feeds: Mapping[str, np.ndarray]) -> _Program:
        """Allocate what a new plan needs, run it twice (libraries set themselves up then), and capture it."""
        recording = record(plan, self.bundle.manifest.graphs)
        addresses = {}
        for buffer, tensor in recording.tensors.items():
            if buffer in recording.constants:
                addresses[buffer] = self._constant(feeds, *recording.constants[buffer])
                continue
            if buffer not in self._device_buffers:
                self._device_buffers[buffer] = self.session.allocate(tensor.nbytes, f"the buffer {buffer}")
            addresses[buffer] = self._device_buffers[buffer]
        for buffer in (*recording.uploads, *recording.downloads.values()):
            if buffer not in self._host_buffers:
                tensor = recording.tensors[buffer]
                self._host_buffers[buffer] = self.session.pinned(tensor.shape, tensor.dtype)
        program = _Program(recording, addresses)
        self._fill(recording, feeds)
        for _ in range(2):  # ONNX Runtime still allocates in the second run
            self._walk(program)
            cuda.synchronize(self.stream)
        try:
            program.graph = self.session.capture(self.stream, lambda: self._walk(program), self.check_captured)
        except TurbochainError as error:
            if self._find_fault(error):
                raise
            program.uncaptured = str(error)
            log.warning("the chain runs stage by stage, because it cannot be captured as one CUDA graph: %s", error)
        self._programs[plan] = program
        return program

    def check_captured(self, graph: Any) -> None:  # noqa: B027 (most may be launched)
        """Raise TurbochainError where a captured graph must not be launched."""

    def _constant(self, feeds: Mapping[str, np.ndarray], name: str, row: int) -> int:
        key = (name, row, len(feeds[name]))
        if key not in self._constants:
            self._constants[key] = self._upload(np.ascontiguousarray(feeds[name][row]), name)
        return self._constants[key]

    def _upload(self, value: np.ndarray, name: str) -> int:
        address = self.session.allocate(value.nbytes, f"the schedule's {name}")
        cuda.copy(address, value.ctypes.data, value.nbytes, self.stream)
        cuda.synchronize(self.stream)  # the array may go
        return address

    def _fill(self, recording: Recording, feeds: Mapping[str, np.ndarray]) -> None:
        for buffer, (name, row) in recording.uploads.items():
            np.copyto(self._host_buffers[buffer], feeds[name] if row is None else feeds[name][row])

    def _enqueue(self, program: _Program, observe: Observe | None) -> list[tuple[str, Any, Any]]:
        timed: list[tuple[str, Any, Any]] = []
        if observe:
            self._walk(program, timed)
        elif program.graph is not None:
            cuda.launch(program.graph, self.stream)
        else:
            self._walk(program)
        return timed

    def _walk(self, program: _Program, timed: list[tuple[str, Any, Any]] | None = None) -> None:
        """Put every action on the stream; with `timed`, no two launches at once, and events around each."""
        at = program.addresses
        for action in program.recording.actions:
            match action:
                case ToDevice(buffer):
                    array = self._host_buffers[buffer]
                    cuda.copy(at[buffer], array.ctypes.data, array.nbytes, self.stream)
                case ToHost(buffer):
                    array = self._host_buffers[buffer]
                    cuda.copy(array.ctypes.data, at[buffer], array.nbytes, self.stream)
                case OnDevice(source, target):
                    cuda.copy(at[target], at[source], program.recording.tensors[source].nbytes, self.stream)
                case Together(launches) if timed is not None:
                    for launch in launches:
                        start, end = self._timers(len(timed))
                        cuda.record(start, self.stream)
                        self._launch(launch, at, self.stream)
                        cuda.record(end, self.stream)
                        timed.append((launch.graph, start, end))
                case Together(launches):
                    self._branch(launches, at)

    def _timers(self, index: int) -> tuple[Any, Any]:
        """The events around the launch of this number; they are kept for the next time."""
        if index == len(self._events):
            self._events.append((self.session.event(timing=True), self.session.event(timing=True)))
        return self._events[index]

    def _branch(self, launches: Sequence[Launch], at: Mapping[str, int]) -> None:
        """The first launch on the stream itself, each other one on a side stream that leaves it and comes back."""
        others = launches[1:] if self.concurrent else ()
        for i, launch in enumerate(others):
            if i == len(self._side):
                self._side.append((self.session.stream(), self.session.event(), self.session.event()))
            stream, fork, join = self._side[i]
            cuda.record(fork, self.stream)
            cuda.wait(stream, fork)
            self._launch(launch, at, stream)
            cuda.record(join, stream)
        for launch in launches if not self.concurrent else launches[:1]:
            self._launch(launch, at, self.stream)
        for _, _, join in self._side[: len(others)]:
            cuda.wait(self.stream, join)

    def _launch(self, launch: Launch, at: Mapping[str, int], stream: Any) -> None:
        self._stages[launch.graph].enqueue({name: at[buffer] for name, buffer in launch.buffers}, stream)

    def unload(self, graph: str) -> None:
        """Give back the memory of a graph that no later plan runs."""
        self.session.synchronize()
        of_it = [p for p in self._programs if any(isinstance(o, Run) and o.graph == graph for o in p)]
        for program in of_it:
            del self._programs[program]
        del self._stages[graph]

    def close(self) -> None:
        """Give back the graphs, the buffers and the stages; a second call does nothing."""
        self.session.synchronize()
        self._programs.clear()
        self._stages.clear()
        for buffers in (self._device_buffers, self._host_buffers, self._constants):
            buffers.clear()
        self.session.close()
