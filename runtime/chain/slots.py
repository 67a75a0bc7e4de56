"""Which graphs of a chain have slots for adapters, in which modes it runs them, and what feeds the slots."""

from dataclasses import dataclass
from functools import cached_property

from turbochain.runtime.bundle.manifest import Graph, Stage
from turbochain.runtime.chain.opened import OpenChain

DOWN, UP = "lora_down", "lora_up"
"""The inputs of a graph with slots, fp32, 1-D."""


@dataclass(frozen=True)
class ChainSlots:
    """The slots of one chain."""

    chain: OpenChain

    @cached_property
    def modes(self) -> list[str]:
        """Return the modes in which a graph with slots replaces the plain one, the least rank first."""
        plain = {self._graph(s).role for s in self._running("") if not self._graph(s).slots}
        sizes = {}
        for mode in self.chain.chain.modes:
            new = [g for s in self._running(mode) if (g := self._graph(s)).slots and g.role in plain]
            if new:
                sizes[mode] = max(t.shape[0] for graph in new for t in graph.inputs if t.name == DOWN)
        return sorted(sizes, key=sizes.__getitem__)

    def graphs(self, mode: str) -> dict[str, str]:
        """Return component → the graph with slots that a call runs with this mode alone ("": with none)."""
        return {self._graph(s).component: s.graph for s in self._running(mode) if self._graph(s).slots}

    @cached_property
    def feeds(self) -> dict[str, tuple[str, str]]:
        """Return feed → the graph whose slots it fills, and which of the graph's two inputs it is."""
        found: dict[str, tuple[str, str]] = {}
        for stage in self.chain.chain.stages:
            if self._graph(stage).slots:
                found |= {stage.wires.get(end, end): (stage.graph, end) for end in (DOWN, UP)}
        return found

    def _running(self, mode: str) -> list[Stage]:
        return [s for s in self.chain.chain.stages if s.runs((mode,))]

    def _graph(self, stage: Stage) -> Graph:
        return self.chain.graphs[stage.graph]
