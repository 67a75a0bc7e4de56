"""The executor that the CPU backends share: buffers in memory, graphs launched one after the other."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from turbochain.runtime.backends import forks
from turbochain.runtime.backends.contract import Cancel, Observe, Opened, Results, others_of_same_weights, stop_if
from turbochain.runtime.bundle.manifest import Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Plan, Run, Upload, ends
from turbochain.runtime.errors import InputError

LOADING = 2
"""How many graphs are loaded at once: a load is mostly one thread that waits for memory."""

Arrays = Mapping[str, np.ndarray]
Launch = Callable[[], None]


class CpuGraph(ABC):
    """A graph that is loaded."""

    @abstractmethod
    def bind(self, arrays: Arrays) -> Launch:
        """Return a function that launches the graph on these arrays, one for each input and output by its name."""

    @abstractmethod
    def operators(self) -> Iterable[tuple[str, float]]:
        """Return the kind of every operator, and its mean seconds in one launch; see `Executor.operators`."""


class CpuExecutor(ABC):
    """An `Executor` with one numpy array for each tensor, allocated once."""

    def __init__(self, opened: Opened) -> None:
        """Load nothing yet."""
        self.opened, self.device = opened, opened.device
        self._working = forks.gate()
        self._graphs: dict[str, CpuGraph] = {}
        self._buffers: dict[Tensor, np.ndarray] = {}
        self._programs: dict[Plan, _Program] = {}
        self._launches: dict[Run, Launch] = {}

    @abstractmethod
    def load_graph(self, name: str) -> CpuGraph:
        """Load a graph; TurbochainError if the backend cannot, BundleError if it is not what the manifest says."""

    def copies_weights(self, name: str) -> bool:
        """Return whether a graph that is loaded holds a copy of its weights, and does not use the bundle's file."""
        return True

    @property
    def loaded(self) -> frozenset[str]:
        """See Executor."""
        return frozenset(self._graphs)

    def load(self, graphs: Iterable[str]) -> None:
        """See Executor. The largest is loaded first, the others meanwhile."""
        wanted = {*graphs}
        missing = sorted(wanted - self.loaded, key=self._size, reverse=True)
        if not missing:
            return
        for other in others_of_same_weights(self.opened.bundle.manifest.graphs, self.loaded, wanted):
            if self.copies_weights(other) and not self.opened.keep_all:
                self.unload(other)
        with self._working, ThreadPoolExecutor(LOADING) as pool:
            self._graphs |= dict(zip(missing, pool.map(self.load_graph, missing), strict=True))

    def _size(self, name: str) -> int:
        manifest = self.opened.bundle.manifest
        return sum(manifest.files[file].size for file in manifest.graphs[name].data)

    def execute(
        self, plan: Plan, feeds: Arrays, *, observe: Observe | None = None, cancel: Cancel | None = None
    ) -> Results:
        """See Executor."""
        program = self._programs.get(plan) or self._prepare(plan)
        buffers, arrays, total = program.buffers, {}, 0.0
        for operation in plan.operations:
            match operation:
                case Upload(name, None):
                    np.copyto(buffers[name], feeds[name])
                case Upload(name, row) | Constant(name, _, row):
                    np.copyto(buffers[name], feeds[name][row])
                case Copy(source, target):
                    np.copyto(buffers[target], buffers[source])
                case Run(graph):
                    stop_if(cancel)
                    with self._working:
                        start = time.perf_counter()
                        program.launches[operation]()
                        seconds = time.perf_counter() - start
                    total += seconds
                    if observe is not None:
                        observe(graph, seconds)
                case Download(name):
                    arrays[name] = buffers[name]
        return Results(arrays, total)

    def _prepare(self, plan: Plan) -> "_Program":
        graphs = self.opened.bundle.manifest.graphs
        buffers = {name: self._buffer(tensor) for name, tensor in plan.tensors(graphs).items()}
        launches = {}
        for run in dict.fromkeys(o for o in plan.operations if isinstance(o, Run)):
            if run not in self._launches:
                graph = graphs[run.graph]
                tensors = zip((*graph.inputs, *graph.outputs), ends(run, graph), strict=True)
                arrays = {own.name: self._buffer(tensor) for own, (_, tensor) in tensors}
                with self._working:
                    self._launches[run] = self._graphs[run.graph].bind(arrays)
            launches[run] = self._launches[run]
        self._programs[plan] = _Program(buffers, launches)
        return self._programs[plan]

    def _buffer(self, tensor: Tensor) -> np.ndarray:
        if tensor not in self._buffers:
            self._buffers[tensor] = np.zeros(tensor.shape, tensor.dtype)
        return self._buffers[tensor]

    def hold(self, plan: Plan, values: Arrays) -> None:
        """See Executor."""
        tensors = plan.tensors(self.opened.bundle.manifest.graphs)
        for name, value in values.items():
            np.copyto(self._buffer(tensors[name]), value)

    def can_patch(self, name: str) -> bool:
        """See Executor."""
        return False

    def patch(self, name: str, values: Arrays) -> None:
        """See Executor."""
        raise InputError(f"the weights of {name} cannot be changed here: onnxruntime does that on a CPU, in fp32")

    def operators(self, name: str) -> Iterable[tuple[str, float]]:
        """See Executor."""
        return self._graphs[name].operators()

    def unload(self, name: str) -> None:
        """See Executor."""
        self._programs = {p: program for p, program in self._programs.items() if name not in p.graphs}
        self._launches = {run: launch for run, launch in self._launches.items() if run.graph != name}
        del self._graphs[name]

    def close(self) -> None:
        """See Executor."""
        for kept in (self._programs, self._launches, self._graphs, self._buffers):
            kept.clear()


class _Program:
    """A plan that is ready to run: its buffers by name, and its launches."""

    def __init__(self, buffers: dict[str, np.ndarray], launches: dict[Run, Launch]) -> None:
        self.buffers, self.launches = buffers, launches
