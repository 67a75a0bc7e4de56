"""The types of a backend: `Backend` says what it is, `Executor` runs plans."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from turbochain.runtime.bundle.manifest import EngineKey, Gpu, Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import Plan
from turbochain.runtime.errors import Cancelled

Options = Mapping[str, Any]
Observe = Callable[[str, float], None]
"""Called with a graph's name and the seconds that one launch of it took."""
Cancel = Callable[[], bool]
"""Asked between launches: True ends the call with `Cancelled`."""


@dataclass(frozen=True)
class Device:
    """Where an executor runs."""

    kind: str  # "cpu" or "cuda"
    index: int = 0  # the CUDA ordinal
    gpu: Gpu | None = None  # if the kind is "cuda"

    def __str__(self) -> str:
        return str(self.gpu) if self.gpu else self.kind


@dataclass(frozen=True)
class Preference:
    """What a backend is like on one kind of device."""

    rank: int  # the backend of the highest rank is chosen
    reason: str  # why, as a phrase
    precisions: tuple[str, ...]  # what it computes in; the first is what a bundle is exported in by default


@dataclass(frozen=True)
class Opened:
    """What an executor is made of: an engine whose files have been hashed, and where it runs."""

    bundle: Bundle
    folder: Path  # the engine's
    options: Options
    device: Device
    threads: int | None = None  # CPU threads of one launch; None: the backend's own choice
    profile: bool = False  # whether `Executor.operators` will be asked for
    keep_all: bool = False  # whether graphs stay loaded whose weights others hold too: see `Executor.load`


@dataclass(frozen=True)
class Results:
    """What one plan made."""

    arrays: Mapping[str, np.ndarray]  # the downloads: views that are valid until the executor's next call
    seconds: float  # how long the device worked; on a GPU with the copies
    uncaptured: str | None = None  # on a GPU, why the plan did not run as one CUDA graph


class Executor(Protocol):
    """Runs plans on the graphs of one engine, whichever chains they belong to; buffers are shared by name and shape.

    Not safe for several threads at once: the caller holds a lock around a call and the reading of its results.
    """

    device: Device

    @property
    def loaded(self) -> frozenset[str]:
        """Return the names of the graphs that are loaded."""

    def load(self, graphs: Iterable[str]) -> None:
        """Load those of the graphs that are not loaded yet; TurbochainError if the backend cannot.

        A graph that holds a copy of the weights of one of these (for another size or batch, with slots or without) is
        unloaded first, unless the executor was opened with `keep_all`.
        """

    def execute(
        self,
        plan: Plan,
        feeds: Mapping[str, np.ndarray],
        *,
        observe: Observe | None = None,
        cancel: Cancel | None = None,
    ) -> Results:
        """Carry out a plan whose graphs are loaded.

        `feeds[name]` has the buffer's shape, or [rows, *shape] if the plan names rows. Raises Cancelled if `cancel`
        says so; the next call is not affected by that.
        """

    def hold(self, plan: Plan, values: Mapping[str, np.ndarray]) -> None:
        """Write buffers of a plan that no plan uploads: they keep their values from call to call."""

    def can_patch(self, name: str) -> bool:
        """Return whether `patch` can give initializers of a graph other values."""

    def patch(self, name: str, values: Mapping[str, np.ndarray]) -> None:
        """Let a graph be loaded with these fp32 values in place of initializers of its file, by name, or with none.

        The arrays are used as they are, not copied. If the graph is loaded it is unloaded, for the next `load`.
        """

    def operators(self, name: str) -> Iterable[tuple[str, float]]:
        """Return the kind of every operator of a graph, and its mean seconds in one launch; asked for once.

        Only for an executor that was opened with `profile`; InputError on a device that has no such profile.
        """

    def unload(self, name: str) -> None:
        """Give back the memory of a graph that no later plan runs."""

    def close(self) -> None:
        """Give everything back; a second call does nothing."""


def others_of_same_weights(graphs: Mapping[str, Graph], loaded: Set[str], wanted: Set[str]) -> list[str]:
    """Return the graphs that are loaded, are not wanted, and have role and weights in common with one that is.

    They are the wanted ones for another size or batch, with slots or without. (A VAE's encoder and its decoder are in
    the same files, and have no weights in common.)
    """
    weights = {(graphs[name].role, file) for name in wanted for file in graphs[name].data}
    return [n for n in sorted(loaded - wanted) if any((graphs[n].role, file) in weights for file in graphs[n].data)]


def own_precision(graph: Graph, options: Options) -> str:
    """Return the graph's own precision: what an engine computes in unless its backend says otherwise."""
    return graph.precision


@dataclass(frozen=True)
class Backend:
    """A backend: the constant `BACKEND` of its module. Nothing in it imports the library before it is called."""

    name: str
    libraries: tuple[str, ...]  # the distributions that provide it, in order of preference
    install: str  # the command that installs it
    preferences: Mapping[str, Preference]  # by kind of device: "cpu", "cuda"
    device: Callable[[str | None], Device]  # the device of a name (None: the default); InputError if there is none
    misfit: Callable[[EngineKey, tuple[str, str], Device], str | None]
    # (key, (library, version), device) → why such an engine does not run there, as a phrase; None if it does
    executor: Callable[[Opened], Executor]
    precision: Callable[[Graph, Options], str] = own_precision  # what an engine with these options computes a graph in
    target: Callable[[str], Device] | None = None  # GPUs of another machine, by an architecture such as "sm89"
    elsewhere: str = ""  # the command that takes its engines to where they run; here they do only if one is asked for


def stop_if(cancel: Cancel | None) -> None:
    """Raise Cancelled if the caller wants the call to end."""
    if cancel is not None and cancel():
        raise Cancelled("the call was cancelled")
