"""LoRA adapters of a pipeline: diffusers' methods, and how a call's graphs get what is active."""

import itertools
import os
import threading
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.names import shapes
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.slots import DOWN, ChainSlots
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import adapter_files, adapters
from turbochain.runtime.inputs.adapters import Adapter
from turbochain.runtime.inputs.numbers import is_number
from turbochain.runtime.inputs.slots import Layout, Matrices, Packed, read_layout
from turbochain.runtime.patches import Patches

SLOTS, PATCH = "slots", "patch"
"""How graphs get an adapter: as an input, or as other weights."""
MOST_RANK = 256
Weight = float | Mapping[str, float] | None
"""An adapter's weight, or component → weight; None: 1."""

_SERIALS = itertools.count()


@dataclass(frozen=True)
class Loaded:
    """An adapter that is loaded."""

    adapter: Adapter
    matrices: Mapping[str, Matrices]  # component → what its slots get; none of a component that is patched
    key: int  # of this load alone

    @property
    def components(self) -> Collection[str]:
        """Return the components that it changes."""
        return self.adapter.components.keys()


class Adapters:
    """The adapters that are loaded, those that are active, and what graphs get of them. The caller holds a lock."""

    def __init__(self, bundle: Bundle, executor: Executor, how: str | None = None) -> None:
        """`how`: SLOTS, PATCH, or None for the slots if there are any. Raises InputError if that cannot be."""
        self.bundle = bundle
        self._loaded: dict[str, Loaded] = {}
        self._weights: dict[str, Mapping[str, float]] = {}  # of every loaded one: component → weight
        self._active: dict[str, tuple[str, ...]] = {}  # component → the active ones
        self._patches = Patches(bundle)
        self._chains: dict[str, ChainSlots] = {}
        self._layouts: dict[str, Layout] = {}
        self._packed: dict[tuple[str, Layout], Packed] = {}
        if how not in (SLOTS, PATCH, None):
            raise InputError(f"lora={how!r}: {SLOTS!r}, {PATCH!r} or None was expected; leave it out for the best one")
        graphs = bundle.manifest.graphs
        networks = [name for name, graph in graphs.items() if graph.role == "unet"]
        has_slots = any(graphs[name].slots for name in networks)
        self._how = how or (SLOTS if has_slots else PATCH)
        self._why_not = None
        if self._how == SLOTS and not has_slots:
            self._why_not = "it has no slots for adapters"
        if self._how == PATCH and not all(map(executor.can_patch, networks)):
            self._why_not = (
                "it has no slots for adapters, and without these only onnxruntime takes one, on a CPU and in fp32"
                if how is None
                else "weights can be patched with onnxruntime alone, on a CPU and in fp32"
            )
        if how is not None and self._why_not:
            raise InputError(f"lora={how!r}: this bundle cannot have that here, for {self._why_not}; {_BUILD}")

    # What diffusers' methods do.

    def load(self, path: str | os.PathLike[str], weight_name: str | None, adapter_name: str | None) -> None:
        """See `AdapterMethods.load_lora_weights`."""
        file = _file(path, weight_name)
        if self._why_not:
            raise InputError(f"{file} cannot be loaded into this bundle: {self._why_not}; {_BUILD}")
        name = adapter_name
        if name is None:
            name = next(n for i in itertools.count(len(self._loaded)) if (n := f"default_{i}") not in self._loaded)
        if not isinstance(name, str) or not name:
            raise InputError(f"adapter_name={adapter_name!r}: a name was expected; leave it out for one that is free")
        if name in self._loaded:
            raise InputError(f"adapter_name={name!r}: an adapter of this name is loaded; choose another name")
        adapter = adapters.read(file, shapes(self.bundle))
        key, matrices = next(_SERIALS), {}
        if self._how == SLOTS:
            adapter = self._fitting(adapter)
            matrices = {c: Matrices.of(key, added) for c, added in adapter.components.items()}
        elif lacking := self._patches.lacking(adapter):
            raise InputError(
                f"{file} changes {lacking}, which this bundle holds in its tables or in other values; {_fuse(file)}"
            )
        self._loaded[name] = Loaded(adapter, matrices, key)
        self._weights[name] = dict.fromkeys(adapter.components, 1.0)
        self._active |= dict.fromkeys(adapter.components, (name,))  # others keep theirs, as in diffusers

    def set(self, names: str | Sequence[str], weights: Weight | Sequence[Weight]) -> None:
        """See `AdapterMethods.set_adapters`."""
        wanted = self._known(names)
        if len({*wanted}) != len(wanted):
            raise InputError(f"adapter_names={list(wanted)}: one of them is there twice; give each once")
        listed = list(weights) if isinstance(weights, list | tuple) else [weights] * len(wanted)
        if len(listed) != len(wanted):
            raise InputError(
                f"adapter_weights has {len(listed)}, and {len(wanted)} adapters are named: one, or one for each of "
                "them, was expected"
            )
        given = {name: self._weight(name, weight) for name, weight in zip(wanted, listed, strict=True)}
        if self._how == SLOTS:
            self._check_ranks(wanted)
        self._weights |= given
        self._active = dict.fromkeys(self.listed, wanted)

    def delete(self, names: str | Sequence[str]) -> None:
        """See `AdapterMethods.delete_adapters`."""
        for name in self._known(names):
            del self._loaded[name], self._weights[name]
            for component in [c for c, active in self._active.items() if name in active]:
                left = tuple(n for n in self._active[component] if n != name)
                self._active[component] = left or tuple(self.listed.get(component, ()))[:1]

    def clear(self) -> None:
        """Forget all adapters."""
        self._loaded.clear()
        self._weights.clear()
        self._packed.clear()
        self._active.clear()

    @property
    def active(self) -> tuple[str, ...]:
        """Return the names of the active adapters."""
        return tuple(dict.fromkeys(name for names in self._active.values() for name in names))

    @property
    def listed(self) -> dict[str, list[str]]:
        """Return component → the names of the loaded adapters that change it."""
        components = dict.fromkeys(c for one in self._loaded.values() for c in one.components)
        return {c: [name for name, one in self._loaded.items() if c in one.components] for c in components}

    @property
    def told(self) -> tuple[tuple[str, float], ...]:
        """Return the active adapters with their weights; of different ones that of the first component."""
        return tuple((name, next(iter(self._weights[name].values()))) for name in self.active)

    @property
    def files(self) -> tuple[tuple[str, float], ...]:
        """Return the same with the digests of their files in place of names, as a recorded case has them."""
        return tuple((adapter_files.digest(self._loaded[name].adapter.path), weight) for name, weight in self.told)

    def _known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        wanted = (names,) if isinstance(names, str) else tuple(names)
        if unknown := [name for name in wanted if name not in self._loaded]:
            loaded = ", ".join(self._loaded) or "none"
            raise InputError(
                f"adapter_names: {unknown[0]!r} is not loaded; choose from {loaded}, or load it with load_lora_weights"
            )
        return wanted

    def _weight(self, name: str, weight: Weight) -> dict[str, float]:
        """Return component → weight. What a mapping leaves out is 1, as in diffusers."""
        of = weight if isinstance(weight, Mapping) else dict.fromkeys(self._loaded[name].components, weight)
        found = {c: 1.0 if (value := of.get(c)) is None else value for c in self._loaded[name].components}
        for value in found.values():
            if not is_number(value) or not abs(value) <= np.finfo(np.float32).max:
                raise InputError(
                    f"adapter_weights: {value!r} for {name!r}; a finite number was expected, or a mapping of unet, "
                    "text_encoder and text_encoder_2 to numbers"
                )
        return {component: float(value) for component, value in found.items()}

    # What slots hold.

    def _fitting(self, adapter: Adapter) -> Adapter:
        """Return an adapter without what the graphs have no use for; InputError if it does not fit the slots."""
        kept = {}
        for component, added in adapter.components.items():
            largest = self._largest(component)
            names = self._patches.names(component)
            covered = largest.parameters if largest else frozenset()
            kept[component] = {n: a for n, a in added.items() if n in covered or not names[n].unused}
            if lacking := next((n for n in kept[component] if n not in covered), None):
                raise InputError(
                    f"{adapter.path} changes {lacking} of the {component}, and this bundle has no slot for it: slots "
                    "are for linear layers and 1x1 convolutions whose result is not in its tables; "
                    f"{_fuse(adapter.path)}"
                )
            most = max((a.rank for a in kept[component].values()), default=0)
            if largest and most > largest.rank:
                raise InputError(
                    f"{adapter.path} has the rank {most} in the {component}, and the slots of this bundle hold "
                    f"{largest.rank}; {_rank(most)}"
                )
        return Adapter(adapter.path, {c: added for c, added in kept.items() if added})

    def _largest(self, component: str) -> Layout | None:
        """Return the layout of a component's slots of the largest rank."""
        graphs = self.bundle.manifest.graphs.items()
        found = [self._layout(name) for name, graph in graphs if graph.component == component and graph.slots]
        return max(found, key=lambda layout: layout.rank, default=None)

    def _check_ranks(self, names: Iterable[str]) -> None:
        """Raise InputError if adapters do not fit into the slots side by side."""
        names = list(names)
        for component in self.listed:
            largest, needed = self._largest(component), self._needed(component, names)
            if largest and needed > largest.rank:
                raise InputError(
                    f"the adapters {', '.join(names)} have the rank {needed} together in the {component}, and the slots "
                    f"of this bundle hold {largest.rank}; activate fewer of them, or {_rank(needed)}"
                )

    def _needed(self, component: str, names: Iterable[str]) -> int:
        """Return the rank that adapters have side by side in a component, of the parameter where it is largest."""
        ranks: dict[str, int] = {}
        for name in names:
            for parameter, added in self._loaded[name].adapter.components.get(component, {}).items():
                ranks[parameter] = ranks.get(parameter, 0) + added.rank
        return max(ranks.values(), default=0)

    def _layout(self, graph: str) -> Layout:
        if graph not in self._layouts:
            self._layouts[graph] = read_layout(self.bundle, graph)
        return self._layouts[graph]

    def _slots(self, chain: OpenChain) -> ChainSlots:
        if chain.name not in self._chains:
            self._chains[chain.name] = ChainSlots(chain)
        return self._chains[chain.name]

    # What a call gets.

    def modes(self, chain: OpenChain) -> frozenset[str]:
        """Return the modes that a call needs: those of the least rank that holds all adapters that are loaded, so that
        calls do not alternate; if none does, of the largest. InputError if the chain lacks slots for an active one."""
        if self._how != SLOTS or not self._loaded:
            return frozenset()
        slots = self._slots(chain)
        choices = slots.modes or [""]
        needed = {component: self._needed(component, self._loaded) for component in self.listed}
        for mode in choices:
            graphs = slots.graphs(mode)
            if all(c in graphs and self._layout(graphs[c]).rank >= rank for c, rank in needed.items()):
                break
        lacking = [c for c in self.listed if c not in slots.graphs(mode) and self.state(c)]
        if lacking:
            raise InputError(
                f"the chain {chain.name} has no slots for the {lacking[0]}, which {', '.join(self.active)} changes; "
                "unload it with unload_lora_weights, or draw with another chain"
            )
        return frozenset(filter(None, (mode,)))

    def state(self, component: str) -> Hashable:
        """Return what a component's graphs have now, () if nothing: equal states, equal results."""
        return tuple((one.key, weight) for one, weight in self._of(component))

    def _of(self, component: str) -> list[tuple[Loaded, float]]:
        """Return what changes a component, in the order of loading, whatever the order in which it was set."""
        active = self._active.get(component, ())
        of = [(name, one) for name, one in self._loaded.items() if name in active and component in one.components]
        return [(one, self._weights[name][component]) for name, one in of]

    def fed(self, chain: OpenChain, feed: str) -> Hashable:
        """Return the state of what feeds slots, () if it is zeros, or if it feeds something else."""
        found = self._slots(chain).feeds.get(feed)
        return self.state(chain.graphs[found[0]].component) if found and self._how == SLOTS else ()

    def value(self, chain: OpenChain, feed: str) -> np.ndarray:
        """Return what feeds slots, with the active adapters in it: valid until the next state."""
        graph, end = self._slots(chain).feeds[feed]
        component, layout = chain.graphs[graph].component, self._layout(graph)
        if (component, layout) not in self._packed:
            self._packed[component, layout] = Packed(layout)
        packed = self._packed[component, layout]
        packed.fill([(one.matrices[component], weight) for one, weight in self._of(component)])
        return packed.down if end == DOWN else packed.up

    def patch(self, executor: Executor, graphs: Collection[str]) -> None:
        """Let graphs that are to run have weights with what is active, if adapters are no input of theirs."""
        if self._how == PATCH:
            changes = {c: [(o.adapter.components[c], weight) for o, weight in self._of(c)] for c in self.listed}
            self._patches.apply(executor, graphs, {c: (self.state(c), of) for c, of in changes.items()})

    def withdraw(self, executor: Executor) -> None:
        """Let all graphs be as the bundle has them; the next call's `patch` changes them again."""
        self._patches.withdraw(executor)


_BUILD = "build another one with build-engine SOURCE --lora-rank 32, or with the adapter in it: --lora FILE"


def _fuse(path: Path) -> str:
    return f"build a bundle with it: build-engine SOURCE --lora {path}"


def _rank(needed: int) -> str:
    if needed > MOST_RANK:
        return "build a bundle with it: build-engine SOURCE --lora FILE"
    return f"build another with build-engine SOURCE --lora-rank {needed}"


def _file(path: str | os.PathLike[str], weight_name: str | None) -> Path:
    """Return the file that a path and a name in it mean."""
    found = Path(path)
    if weight_name is not None:
        return found / weight_name
    if not found.is_dir():
        return found
    files = sorted(found.glob("*.safetensors"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{path} is a folder, and one LoRA file was expected in it ({held}); name it with weight_name")
    return files[0]


class AdapterMethods:
    """Diffusers' methods for LoRA, of a pipeline. Calls in other threads see a change between two calls."""

    _lock: threading.RLock
    _adapters: Adapters

    def _opened(self) -> Executor:
        raise NotImplementedError

    def load_lora_weights(
        self,
        path: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Load a LoRA, which becomes the only active one of the components that it changes, with weight 1, as in
        diffusers; the next call draws with it.

        `path`: a safetensors file (kohya's, peft's or diffusers' names, or what `turbochain adapter convert` wrote), or
        a folder with one, or with `weight_name` in it. `adapter_name` None: default_0, default_1, …. Until
        `unload_lora_weights` every call runs the graphs with slots, so that one UNet is in memory. In a bundle without
        slots, on ONNX Runtime on a CPU in fp32, the next call loads the changed graphs anew, which takes seconds.
        Raises InputError if the file is no LoRA for this model, or the bundle has no place for it.
        """
        with self._lock:
            self._opened()
            self._adapters.load(path, weight_name, adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Let these loaded adapters be active, and no others; [] for none.

        `adapter_weights`: one for all, or one for each (None: 1); a mapping has one for each component, such as
        {"unet": 0.8, "text_encoder": 0.5}. Raises InputError for a name that is not loaded, a weight that is no number,
        or if they do not fit into the slots together.
        """
        with self._lock:
            self._opened()
            self._adapters.set(adapter_names, adapter_weights)

    def unload_lora_weights(self) -> None:
        """Forget all adapters: the next call draws as if none had been loaded, bit for bit."""
        with self._lock:
            self._opened()
            self._adapters.clear()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget these adapters; if no active one is left, the first that is loaded becomes active, as in diffusers."""
        with self._lock:
            self._opened()
            self._adapters.delete(adapter_names)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters, in the order in which they were set."""
        with self._lock:
            return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return component → the names of the loaded adapters that change it."""
        with self._lock:
            return self._adapters.listed
