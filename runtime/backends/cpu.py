"""What the backends that run in host memory share: the buffers, and walking a plan."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.backends import Device
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import Constant, Copy, Download, Plan, Run, Upload

LOADING = 2
"""Graphs that are loaded at once: a load is for the most part one thread that waits for memory."""

Observe = Callable[[str, float], None]
"""Called with a graph's name and the seconds that one launch of it took."""


class HostExecutor(ABC):
    """One numpy array per name, allocated once; graphs are launched one after the other.

    Not safe for several threads at once: the caller holds a lock around `execute` and the reading of
    its results.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        options: Mapping[str, Any],
        *,
        device: Device,
        threads: int | None = None,
        graphs: Sequence[str] | None = None,
        profile: bool = False,
    ) -> None:
        """`graphs`: load only these of the chain (None: all of it). `profile`: `operators` will be asked for."""
        self.bundle, self.folder, self.options = bundle, folder, dict(options)
        self.device, self.threads, self.profile = device, threads, profile
        self.seconds = 0.0
        """How long the graphs' launches of the last `execute` took."""
        self.buffers = {name: np.zeros(t.shape, t.dtype) for name, t in bundle.tensors.items()}
        # The largest first: the others are loaded meanwhile.
        names = sorted(graphs or bundle.chain.graphs, key=self._size, reverse=True)
        with ThreadPoolExecutor(LOADING) as pool:
            self._graphs = dict(zip(names, pool.map(self.load, names), strict=True))

    @abstractmethod
    def load(self, graph: str) -> Callable[[], None]:
        """Load a graph, bind its inputs and outputs to `self.buffers`, and return what launches it."""

    @abstractmethod
    def operators(self, graph: str) -> Iterable[tuple[str, float]]:
        """With `profile`: the kind of every operator of a graph, and its mean seconds of one launch; asked for once."""

    def _size(self, graph: str) -> int:
        return sum(self.bundle.manifest.files[file].size for file in self.bundle.manifest.graphs[graph].data)

    @property
    def loaded(self) -> set[str]:
        """The graphs that are loaded."""
        return set(self._graphs)

    def execute(
        self, plan: Plan, feeds: Mapping[str, np.ndarray], observe: Observe | None = None
    ) -> dict[str, np.ndarray]:
        """Carry out a plan. `feeds[name]` has the buffer's shape, or [steps, *shape] where rows are named.

        Returns the downloads: views of the buffers, valid until the next call.
        """
        results = {}
        self.seconds = 0.0
        for operation in plan:
            match operation:
                case Upload(name, None):
                    np.copyto(self.buffers[name], feeds[name])
                case Upload(name, row) | Constant(name, row):
                    np.copyto(self.buffers[name], feeds[name][row])
                case Copy(source, target):
                    np.copyto(self.buffers[target], self.buffers[source])
                case Run(graph):
                    start = time.perf_counter()
                    self._graphs[graph]()
                    seconds = time.perf_counter() - start
                    self.seconds += seconds
                    if observe:
                        observe(graph, seconds)
                case Download(name):
                    results[name] = self.buffers[name]
        return results

    def unload(self, graph: str) -> None:
        """Give back the memory of a graph that no later plan runs."""
        del self._graphs[graph]

    def close(self) -> None:
        """Give back the graphs and the buffers."""
        self._graphs.clear()
        self.buffers.clear()
