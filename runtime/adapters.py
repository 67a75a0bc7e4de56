"""LoRA adapters of a pipeline: what is loaded, what is active, and what a call's graphs get of it."""

import itertools
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.names import shapes
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import adapter_files, adapters
from turbochain.runtime.inputs.adapter_names import PREFIXES
from turbochain.runtime.inputs.adapters import Adapter
from turbochain.runtime.inputs.numbers import LARGEST, is_number
from turbochain.runtime.inputs.slots import Matrices
from turbochain.runtime.patches import Patches
from turbochain.runtime.slots import Slots, fuse

SLOTS, PATCH = "slots", "patch"
"""How graphs get an adapter: as an input, or as other weights."""
Weight = float | Mapping[str, float] | None
"""An adapter's weight, or component → weight; None: 1."""

_SERIALS = itertools.count()


@dataclass(frozen=True)
class LoadedAdapter:
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
        self._loaded: dict[str, LoadedAdapter] = {}
        self._weights: dict[str, Mapping[str, float]] = {}  # of every loaded one: component → weight
        self._active: dict[str, tuple[str, ...]] = {}  # component → the active ones
        self._modes: dict[str, frozenset[str]] = {}  # chain → those of a call
        self._slots, self._patches = Slots(bundle), Patches(bundle)
        if how not in (SLOTS, PATCH, None):
            raise InputError(f"lora={how!r}: {SLOTS!r}, {PATCH!r} or None was expected; leave it out for the best one")
        graphs = bundle.manifest.graphs
        networks = [name for name, graph in graphs.items() if graph.role == "unet"]
        has_slots = any(graphs[name].slots for name in networks)
        self._how = how or (SLOTS if has_slots else PATCH)
        patched = [name for name, graph in graphs.items() if graph.component in PREFIXES]
        self._why_not = None
        if self._how == SLOTS and not has_slots:
            self._why_not = "it has no slots for adapters"
        if self._how == PATCH and not all(map(executor.can_patch, patched)):
            self._why_not = (
                "it has no slots for adapters, and without these only onnxruntime takes one, on a CPU and in fp32"
                if how is None
                else "weights can be patched with onnxruntime alone, on a CPU and in fp32"
            )
        if how is not None and self._why_not:
            raise InputError(f"lora={how!r}: this bundle cannot have that here, for {self._why_not}; {_BUILD}")

    # What diffusers' methods do.

    def load(self, path: str | os.PathLike[str], weight_name: str | None, adapter_name: str | None) -> None:
        """See `LoraMethods.load_lora_weights`."""
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
            adapter = self._slots.fitting(adapter)
            matrices = {c: Matrices.of(key, added) for c, added in adapter.components.items()}
        elif lacking := self._patches.lacking(adapter):
            raise InputError(
                f"{file} changes {lacking}, which this bundle holds in its tables or in other values; {fuse(file)}"
            )
        else:
            adapter = _copied(adapter)
        self._loaded[name] = LoadedAdapter(adapter, matrices, key)
        self._weights[name] = dict.fromkeys(adapter.components, 1.0)
        self._active |= dict.fromkeys(adapter.components, (name,))  # others keep theirs, as in diffusers
        self._modes.clear()

    def set(self, names: str | Sequence[str], weights: Weight | Sequence[Weight]) -> None:
        """See `LoraMethods.set_adapters`."""
        wanted = self._known(names)
        if len({*wanted}) != len(wanted):
            raise InputError(f"adapter_names={list(wanted)}: one of them is there twice; give each once")
        listed: list[Any] = list(weights) if isinstance(weights, list | tuple) else [weights] * len(wanted)
        if len(listed) != len(wanted):
            raise InputError(
                f"adapter_weights has {len(listed)}, and {len(wanted)} adapters are named: one, or one for each of "
                "them, was expected"
            )
        given = {name: self._weight(name, weight) for name, weight in zip(wanted, listed, strict=True)}
        if self._how == SLOTS:
            self._slots.check_ranks({name: self._loaded[name].adapter for name in wanted})
        self._weights |= given
        self._active = dict.fromkeys(self.listed, wanted)
        self._modes.clear()

    def delete(self, names: str | Sequence[str]) -> None:
        """See `LoraMethods.delete_adapters`."""
        for name in dict.fromkeys(self._known(names)):
            del self._loaded[name], self._weights[name]
            for component in [c for c, active in self._active.items() if name in active]:
                left = tuple(n for n in self._active[component] if n != name)
                self._active[component] = left or tuple(self.listed.get(component, ()))[:1]
        self._modes.clear()

    def clear(self) -> None:
        """Forget all adapters."""
        self._loaded.clear()
        self._weights.clear()
        self._slots.clear()
        self._active.clear()
        self._modes.clear()

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
        """Return the active adapters with their weights; of different ones that of the UNet, if it is changed."""
        weights = ((name, self._weights[name]) for name in self.active)
        return tuple((name, of.get("unet", next(iter(of.values()), 1.0))) for name, of in weights)

    @property
    def files(self) -> tuple[tuple[str, float], ...]:
        """Return the same with the digests of their files in place of names, as a recorded case has them."""
        return tuple((adapter_files.digest(self._loaded[name].adapter.path), weight) for name, weight in self.told)

    def _known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        wanted = (names,) if isinstance(names, str) else tuple(names)
        if wrong := [name for name in wanted if not isinstance(name, str)]:
            raise InputError(f"adapter_names: {wrong[0]!r} is no name; one name or a list of names was expected")
        if unknown := [name for name in wanted if name not in self._loaded]:
            loaded = ", ".join(self._loaded) or "none"
            raise InputError(
                f"adapter_names: {unknown[0]!r} is not loaded; choose from {loaded}, or load it with load_lora_weights"
            )
        return wanted

    def _weight(self, name: str, weight: Weight) -> dict[str, float]:
        """Return component → weight. What a mapping leaves out is 1, as in diffusers."""
        of = weight if isinstance(weight, Mapping) else dict.fromkeys(self._loaded[name].components, weight)
        if unknown := [c for c in of if c not in PREFIXES]:
            raise InputError(f"adapter_weights: {unknown[0]!r} is no component; choose from {', '.join(PREFIXES)}")
        found = {c: 1.0 if (value := of.get(c)) is None else value for c in self._loaded[name].components}
        for value in found.values():
            if not is_number(value) or not abs(value) <= LARGEST:
                raise InputError(
                    f"adapter_weights: {value!r} for {name!r}; a finite number was expected, or a mapping of unet, "
                    "text_encoder and text_encoder_2 to numbers"
                )
        return {component: float(value) for component, value in found.items()}

    # What a call gets.

    def modes(self, chain: OpenChain) -> frozenset[str]:
        """Return the modes that a call needs: those of the least rank that holds all adapters that are loaded, so that
        calls do not alternate; if none does, of the largest. InputError if the chain lacks slots for an active one."""
        if self._how != SLOTS or not self._loaded:
            return frozenset()
        if chain.name not in self._modes:
            loaded = [one.adapter for one in self._loaded.values()]
            changed = [c for c in self.listed if self.state(c)]
            self._modes[chain.name] = frozenset(filter(None, [self._slots.mode(chain, loaded, changed)]))
        return self._modes[chain.name]

    def state(self, component: str) -> Hashable:
        """Return what a component's graphs have now, () if nothing: equal states, equal results."""
        return tuple((one.key, weight) for one, weight in self._of(component))

    @property
    def states(self) -> Hashable:
        """Return the same for all components that adapters change."""
        return tuple((component, self.state(component)) for component in self.listed)

    def _of(self, component: str) -> list[tuple[LoadedAdapter, float]]:
        """Return what changes a component, in the order of loading, whatever the order in which it was set."""
        active = self._active.get(component, ())
        of = [(name, one) for name, one in self._loaded.items() if name in active and component in one.components]
        return [(one, self._weights[name][component]) for name, one in of]

    def fed(self, chain: OpenChain, feed: str) -> Hashable:
        """Return the state of what feeds slots, () if it is zeros, or if it feeds something else."""
        component = self._slots.component(chain, feed) if self._how == SLOTS else None
        return () if component is None else self.state(component)

    def value(self, chain: OpenChain, feed: str) -> np.ndarray:
        """Return what feeds slots, with the active adapters in it: valid until the next state."""
        component = self._slots.component(chain, feed)
        assert component is not None
        return self._slots.value(chain, feed, [(one.matrices[component], w) for one, w in self._of(component)])

    def patch(self, executor: Executor, graphs: Collection[str]) -> None:
        """Let graphs that are to run have weights with what is active, if adapters are no input of theirs."""
        if self._how == PATCH:
            changes = {c: [(o.adapter.components[c], weight) for o, weight in self._of(c)] for c in self.listed}
            self._patches.apply(executor, graphs, {c: (self.state(c), of) for c, of in changes.items()})

    def withdraw(self, executor: Executor) -> None:
        """Let all graphs be as the bundle has them; the next call's `patch` changes them again."""
        self._patches.withdraw(executor)


def _copied(adapter: Adapter) -> Adapter:
    """Return an adapter that does not depend on its file any more."""
    components = {
        c: {n: replace(a, down=np.array(a.down), up=np.array(a.up)) for n, a in added.items()}
        for c, added in adapter.components.items()
    }
    return Adapter(adapter.path, components)


_BUILD = "build another one with build-engine SOURCE --lora-rank 32, or with the adapter in it: --lora FILE"


def _file(path: str | os.PathLike[str], weight_name: str | None) -> Path:
    """Return the file that a path and a name in it mean."""
    found = Path(path)
    if not found.is_dir():
        return found
    if weight_name is not None:
        return found / weight_name
    files = sorted(found.glob("*.safetensors"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{path} is a folder, and one LoRA file was expected in it ({held}); name it with weight_name")
    return files[0]
