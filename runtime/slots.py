"""Slots of a bundle: which adapters fit into them, which of its graphs a call runs, and what these are fed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from turbochain.runtime.bundle.names import Parameter, read_names
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.slots import DOWN, ChainSlots
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.adapters import Adapter
from turbochain.runtime.inputs.slots import Packed, SlotLayout, Weighted, read_layout

MOST_RANK = 256
"""The largest rank that slots can be built with."""


class Slots:
    """The slots of all chains of a bundle. The caller holds a lock."""

    def __init__(self, bundle: Bundle) -> None:
        """Read nothing yet."""
        self.bundle = bundle
        self._chains: dict[str, ChainSlots] = {}
        self._layouts: dict[str, SlotLayout] = {}
        self._packed: dict[tuple[str, SlotLayout], Packed] = {}

    def fitting(self, adapter: Adapter) -> Adapter:
        """Return an adapter without what the graphs have no use for; InputError if it does not fit the slots."""
        kept = {}
        for component, added in adapter.components.items():
            largest, names = self._largest(component), self._names(component)
            covered = largest.parameters if largest else frozenset()
            kept[component] = {n: a for n, a in added.items() if n in covered or not names[n].unused}
            if lacking := next((n for n in kept[component] if n not in covered), None):
                raise InputError(
                    f"{adapter.path} changes {lacking} of the {component}, and this bundle has no slot for it: slots "
                    "are for linear layers and 1x1 convolutions whose result is not in its tables; "
                    f"{fuse(adapter.path)}"
                )
            most = max((a.rank for a in kept[component].values()), default=0)
            if largest and most > largest.rank:
                raise InputError(
                    f"{adapter.path} has the rank {most} in the {component}, and the slots of this bundle hold "
                    f"{largest.rank}; {_rank(most)}"
                )
        return Adapter(adapter.path, {c: added for c, added in kept.items() if added})

    def check_ranks(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise InputError if adapters, by their names, do not fit into the slots side by side."""
        for component in dict.fromkeys(c for one in adapters.values() for c in one.components):
            largest, needed = self._largest(component), _needed(component, adapters.values())
            if largest and needed > largest.rank:
                raise InputError(
                    f"the adapters {', '.join(adapters)} have the rank {needed} together in the {component}, and the "
                    f"slots of this bundle hold {largest.rank}; activate fewer of them, or {_rank(needed)}"
                )

    def mode(self, chain: OpenChain, loaded: Collection[Adapter], changed: Collection[str]) -> str:
        """Return the mode of the least rank that holds all adapters that are loaded; if none does, of the largest.

        "" if the chain's graphs have slots in every mode. `changed`: the components that active adapters change;
        InputError if one of them has no slots.
        """
        slots, mode = self._of(chain), ""
        components = dict.fromkeys(c for one in loaded for c in one.components)
        needed = {component: _needed(component, loaded) for component in components}
        for mode in slots.modes or [""]:
            graphs = slots.graphs(mode)
            if all(c in graphs and self._layout(graphs[c]).rank >= rank for c, rank in needed.items()):
                break
        if lacking := [c for c in changed if c not in slots.graphs(mode)]:
            raise InputError(
                f"the chain {chain.name} has no slots for the {lacking[0]}, which an active adapter changes; "
                "unload it with unload_lora_weights, or draw with another chain"
            )
        return mode

    def component(self, chain: OpenChain, feed: str) -> str | None:
        """Return the component whose slots are fed under this name; None if none are."""
        found = self._of(chain).feeds.get(feed)
        return found and chain.graphs[found[0]].component

    def value(self, chain: OpenChain, feed: str, wanted: Sequence[Weighted]) -> np.ndarray:
        """Return what is fed under this name with these adapters in it: valid until others are wanted."""
        graph, end = self._of(chain).feeds[feed]
        key = chain.graphs[graph].component, self._layout(graph)
        if key not in self._packed:
            self._packed[key] = Packed(key[1])
        self._packed[key].fill(wanted)
        return self._packed[key].down if end == DOWN else self._packed[key].up

    def clear(self) -> None:
        """Forget what was packed."""
        self._packed.clear()

    def _largest(self, component: str) -> SlotLayout | None:
        """Return the layout of a component's slots of the largest rank."""
        graphs = self.bundle.manifest.graphs.items()
        found = [self._layout(name) for name, graph in graphs if graph.component == component and graph.slots]
        return max(found, key=lambda layout: layout.rank, default=None)

    def _names(self, component: str) -> dict[str, Parameter]:
        graphs = self.bundle.manifest.graphs.items()
        return read_names(self.bundle, next(name for name, graph in graphs if graph.component == component))

    def _layout(self, name: str) -> SlotLayout:
        if name not in self._layouts:
            self._layouts[name] = read_layout(self.bundle, name)
        return self._layouts[name]

    def _of(self, chain: OpenChain) -> ChainSlots:
        if chain.name not in self._chains:
            self._chains[chain.name] = ChainSlots(chain)
        return self._chains[chain.name]


def _needed(component: str, adapters: Iterable[Adapter]) -> int:
    """Return the rank that adapters have side by side in a component, of the parameter where it is largest."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for parameter, added in adapter.components.get(component, {}).items():
            ranks[parameter] = ranks.get(parameter, 0) + added.rank
    return max(ranks.values(), default=0)


def fuse(path: Path | str) -> str:
    """Return the advice for an adapter that has no place in a bundle."""
    return f"build a bundle with it: build-engine SOURCE --lora {path}"


def _rank(needed: int) -> str:
    return fuse("FILE") if needed > MOST_RANK else f"build another with build-engine SOURCE --lora-rank {needed}"
