"""Patches: the weights of a component with adapters added, which a backend loads in place of a graph's own."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.initializers import read_fp32
from turbochain.runtime.bundle.names import Parameter, read_names
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.inputs.adapters import Adapter, LowRank

Changes = Sequence[tuple[Mapping[str, LowRank], float]]
"""What each adapter adds to the parameters of a component, and its weight."""


class Patches:
    """The graphs of a bundle whose weights an executor may change, and what they are now. The caller holds a lock.

    The bundle's files stay as they are: a graph without changes is loaded from them.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Begin with no change."""
        self.bundle = bundle
        self._states: dict[str, Hashable] = {}  # graph → what it was last patched with
        self._merged: dict[str, tuple[Hashable, dict[str, np.ndarray]]] = {}  # component → state, parameter → weight
        self._names: dict[str, dict[str, Parameter]] = {}

    def graphs(self, component: str) -> list[str]:
        """Return the graphs that hold a component's weights."""
        return [name for name, graph in self.bundle.manifest.graphs.items() if graph.component == component]

    def lacking(self, adapter: Adapter) -> str | None:
        """Return "PARAMETER of the COMPONENT" that an adapter changes and a patch cannot; None if there is none."""
        for component, added in adapter.components.items():
            for graph in self.graphs(component):
                names = self._names_of(graph)
                shared = Counter(p.initializer for p in names.values() if p.initializer)
                for parameter in added:
                    if not names[parameter].unused and shared[names[parameter].initializer] != 1:
                        return f"{parameter} of the {component}"
        return None

    def apply(
        self, executor: Executor, graphs: Collection[str], wanted: Mapping[str, tuple[Hashable, Changes]]
    ) -> None:
        """Let these graphs have what is wanted: component → a state, and its changes; equal states, equal changes."""
        for graph in graphs:
            state, changes = wanted.get(self.bundle.manifest.graphs[graph].component, ((), ()))
            if self._states.get(graph, ()) != state:
                executor.patch(graph, self._values(graph, state, changes))
                self._states[graph] = state
        for component in [c for c, (state, _) in self._merged.items() if state not in self._states.values()]:
            del self._merged[component]

    def withdraw(self, executor: Executor) -> None:
        """Let all graphs have the weights of their files."""
        self.apply(executor, list(self._states), {})

    def _values(self, name: str, state: Hashable, changes: Changes) -> dict[str, np.ndarray]:
        """Return a graph's changed initializers by name, in their own shapes."""
        names, entry = self._names_of(name), self.bundle.manifest.graphs[name]
        changed = {n for added, _ in changes for n in added if names[n].initializer}
        stored = read_fp32(self.bundle.plain(name) / entry.file, {names[n].initializer for n in changed})
        known = self._merged.get(entry.component)
        if known is None or known[0] != state:
            of = {n: [(added[n], weight) for added, weight in changes if n in added] for n in changed}
            merged = {n: merge(stored[names[n].initializer].reshape(names[n].shape), of[n]) for n in changed}
            known = self._merged[entry.component] = state, merged
        return {i: known[1][n].reshape(stored[i].shape) for n in changed if (i := names[n].initializer)}

    def _names_of(self, name: str) -> dict[str, Parameter]:
        if name not in self._names:
            self._names[name] = read_names(self.bundle, name)
        return self._names[name]


def merge(weight: np.ndarray, changes: Sequence[tuple[LowRank, float]]) -> np.ndarray:
    """Return a linear layer's or a convolution's weight with products added one after the other, in fp32."""
    for added, strength in changes:
        up, down = (np.asarray(m, np.float32).reshape(len(m), -1) for m in (added.up, added.down))
        weight = weight + (up @ down).reshape(weight.shape) * np.float32(added.scale * strength)
    return weight
