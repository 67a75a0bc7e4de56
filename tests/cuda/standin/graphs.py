"""Captures, and the graphs that they make."""

from dataclasses import dataclass, field

from cuda.bindings import runtime as real

from .streams import Stream, Task

Kind = real.cudaGraphNodeType


@dataclass(eq=False)
class Node:
    """A node of a graph, after others."""

    kind: Kind
    after: frozenset["Node"]
    task: Task | None = None
    copied: tuple[int, int] = (0, 0)  # of a copy: source and target
    child: "Graph | None" = None


@dataclass(eq=False)
class Graph:
    """What was captured."""

    nodes: list[Node]
    device: int

    def flat(self, after: frozenset[object] = frozenset()) -> dict[object, tuple[set[object], Task | None]]:
        """Every node that is not a graph itself, with what it waits for."""
        made: dict[object, tuple[set[object], Task | None]] = {}
        for node in self.nodes:
            before = {*node.after} or {*after}
            if node.child is not None:
                inner = node.child.flat(frozenset(before))
                made |= inner
                made[node] = ({*inner} or before, None)
            else:
                made[node] = (before, node.task)
        return made


@dataclass(eq=False)
class Executable:
    """A graph that can be launched."""

    graph: Graph
    destroyed: bool = False

    def tasks(self) -> list[Task]:
        """Everything that a launch does."""
        return [task for _, task in self.graph.flat().values() if task is not None]


@dataclass(eq=False)
class Capture:
    """A capture that has begun on a stream."""

    origin: Stream
    thread: int
    nodes: list[Node] = field(default_factory=list)
    ends: dict[Stream, frozenset[Node]] = field(default_factory=dict)  # stream → what its next node comes after
    valid: bool = True

    def add(self, stream: Stream, node: Node) -> None:
        """Put a node on a stream."""
        self.nodes.append(node)
        self.ends[stream] = frozenset([node])

    def unjoined(self) -> bool:
        """Whether a node is on a stream that did not come back to the first one."""
        reached: set[Node] = set()
        front = {*self.ends[self.origin]}
        while front:
            reached |= front
            front = {before for node in front for before in node.after} - reached
        return not reached.issuperset(self.nodes)
