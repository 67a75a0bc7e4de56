"""Slots: two inputs of a graph, into which adapters' matrices are packed while it runs.

`lora_down` and `lora_up` are flat. A group of matrices that read one tensor has a part of each; see FEATURES.md.
"""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.slots import DOWN, UP
from turbochain.runtime.errors import BundleError
from turbochain.runtime.inputs.adapters import LowRank


@dataclass(frozen=True)
class Member:
    """A matrix of a group."""

    parameter: str  # its name in the checkpoint
    out: int  # rows


@dataclass(frozen=True)
class Group:
    """Matrices that read the same tensor, in the order in which the graph reads it."""

    in_: int  # columns of each
    members: tuple[Member, ...]


@dataclass(frozen=True)
class SlotLayout:
    """What a graph's slots.json says, and the rank that its inputs have."""

    groups: tuple[Group, ...]
    rank: int

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Return the parameters that have a slot."""
        return frozenset(m.parameter for group in self.groups for m in group.members)

    def places(self, down: np.ndarray, up: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return views of both inputs: parameter → its parts, `lora_down` [in, rank] and `lora_up` [rank, out]."""
        found, rank, at_down, at_up = {}, self.rank, 0, 0
        for group in self.groups:
            width = len(group.members) * rank
            wide = down[at_down : at_down + group.in_ * width].reshape(group.in_, width)
            at_down += wide.size
            for i, member in enumerate(group.members):
                own = up[at_up : at_up + rank * member.out].reshape(rank, member.out)
                at_up += own.size
                found[member.parameter] = wide[:, i * rank : (i + 1) * rank], own
        return found


def read_layout(bundle: Bundle, name: str) -> SlotLayout:
    """Return the layout of a graph with slots; its file is hashed first. Raises BundleError."""
    graph = bundle.manifest.graphs[name]
    bundle.check_files([graph.slots])
    try:
        groups: tuple[Group, ...] = strict_json.convert(
            tuple[Group, ...], json.loads((bundle.path / graph.slots).read_bytes())
        )
    except (OSError, ValueError) as error:
        raise BundleError(f"{graph.slots} is not valid: {error}; build the bundle again") from None
    down, up = (_size(graph, end) for end in (DOWN, UP))
    columns = sum(group.in_ * len(group.members) for group in groups)
    rank = down // columns if columns else 0
    rows = sum(member.out for group in groups for member in group.members)
    if rank < 1 or (rank * columns, rank * rows) != (down, up):
        raise BundleError(
            f"{graph.slots} has {columns} columns and {rows} rows, which do not fit {DOWN} [{down}] and {UP} [{up}]"
            f" of the graph {name}; build the bundle again"
        )
    return SlotLayout(groups, rank)


def _size(graph: Graph, end: str) -> int:
    return next((t.shape[0] for t in graph.inputs if t.name == end and len(t.shape) == 1), 0)


@dataclass(frozen=True)
class Matrices:
    """What an adapter adds to one component, as slots hold it."""

    key: Hashable  # equal keys: equal matrices
    down: Mapping[str, np.ndarray]  # parameter → [in, rank] fp32
    up: Mapping[str, np.ndarray]  # parameter → [rank, out] fp32
    scale: Mapping[str, float]

    @classmethod
    def of(cls, key: Hashable, added: Mapping[str, LowRank]) -> "Matrices":
        """Return copies of the matrices that linear layers and 1×1 convolutions have."""
        down = {n: np.array(a.down.reshape(a.rank, -1).T, np.float32, order="C") for n, a in added.items()}
        up = {n: np.array(a.up.reshape(-1, a.rank).T, np.float32, order="C") for n, a in added.items()}
        return cls(key, down, up, {n: a.scale for n, a in added.items()})


Weighted = tuple[Matrices, float]
"""Matrices, and the adapter's weight."""


class Packed:
    """The two inputs of one layout, with what adapters stand in them; the rest is zeros."""

    def __init__(self, layout: SlotLayout) -> None:
        """Begin with zeros."""
        places = layout.groups
        self.down = np.zeros(layout.rank * sum(g.in_ * len(g.members) for g in places), np.float32)
        self.up = np.zeros(layout.rank * sum(m.out for g in places for m in g.members), np.float32)
        self._places = layout.places(self.down, self.up)
        self._now: Sequence[Weighted] = ()

    def fill(self, wanted: Sequence[Weighted]) -> None:
        """Let these adapters stand side by side, in this order; only what differs from before is written."""
        keys, known = ([m.key for m, _ in of] for of in (wanted, self._now))
        if keys == known:
            changed = [new for new, (_, old) in zip(wanted, self._now, strict=True) if new[1] != old]
            for matrices, weight, parameter, first in _columns(wanted):
                if (matrices, weight) in changed:
                    self._write_up(matrices, weight, parameter, first)
        else:
            ends: dict[str, int] = {}
            for matrices, weight, parameter, first in _columns(wanted):
                down, rank = self._places[parameter][0], len(matrices.up[parameter])
                down[:, first : first + rank] = matrices.down[parameter]
                self._write_up(matrices, weight, parameter, first)
                ends[parameter] = first + rank
            for matrices, _, parameter, first in _columns(self._now):
                begin, end = ends.get(parameter, 0), first + len(matrices.up[parameter])
                if begin < end:
                    down, up = self._places[parameter]
                    down[:, begin:end] = 0
                    up[begin:end] = 0
        self._now = wanted

    def _write_up(self, matrices: Matrices, weight: float, parameter: str, first: int) -> None:
        up, own = self._places[parameter][1], matrices.up[parameter]
        np.multiply(own, np.float32(matrices.scale[parameter] * weight), out=up[first : first + len(own)])


def _columns(adapters: Sequence[Weighted]) -> Iterator[tuple[Matrices, float, str, int]]:
    """Yield the matrices, the weight and the parameter of each product, and the first of its columns in the slot."""
    ends: dict[str, int] = {}
    for matrices, weight in adapters:
        for parameter, up in matrices.up.items():
            first = ends.get(parameter, 0)
            ends[parameter] = first + len(up)
            yield matrices, weight, parameter, first
