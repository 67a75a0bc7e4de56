"""A plan as a GPU carries it out: which buffer each name is at each moment, and which launches may overlap.

A pure value: the executor puts its actions on a stream in this order, once directly and once to be captured. Noise and
a table's columns differ from step to step, so they have a buffer for each row: every address in the captured graph is
fixed. Everything else has one buffer per name.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from turbochain.runtime.backends.cuda import ALIGNMENT
from turbochain.runtime.bundle.manifest import Graph, Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Plan, Run, Upload, ends


@dataclass(frozen=True)
class ToDevice:
    """The host's copy of a buffer → the GPU's."""

    buffer: str


@dataclass(frozen=True)
class ToHost:
    """The GPU's copy of a buffer → the host's."""

    buffer: str


@dataclass(frozen=True)
class OnDevice:
    """One buffer → another, on the GPU."""

    source: str
    target: str


@dataclass(frozen=True)
class Launch:
    """One launch of a graph."""

    graph: str
    inputs: tuple[tuple[str, str], ...]  # the graph's name → the buffer
    outputs: tuple[tuple[str, str], ...]

    @property
    def buffers(self) -> dict[str, str]:
        """Return the buffer of each input and output, by the graph's name."""
        return dict((*self.inputs, *self.outputs))

    def is_independent(self, other: "Launch") -> bool:
        """Return whether neither launch reads or overwrites what the other one writes."""
        mine, theirs = ({b for _, b in launch.outputs} for launch in (self, other))
        return not mine & set(other.buffers.values()) and not theirs & set(self.buffers.values())


@dataclass(frozen=True)
class Together:
    """Launches that may run at the same time."""

    launches: tuple[Launch, ...]


Action = ToDevice | ToHost | OnDevice | Together


@dataclass(frozen=True)
class Recording:
    """What one plan is on a GPU."""

    actions: tuple[Action, ...]
    kept: frozenset[str]  # buffers that it reads as the call before it left them, and leaves changed
    tensors: Mapping[str, Tensor]  # buffer → what it holds
    uploads: Mapping[str, tuple[str, int | None]]  # buffer → the feed that fills it, and which row of it
    constants: Mapping[str, Constant]  # buffer → the row of a table that it holds
    downloads: Mapping[str, str]  # result → its buffer


def record(plan: Plan, graphs: Mapping[str, Graph]) -> Recording:
    """Return what a plan is on a GPU."""
    known = plan.tensors(graphs)
    now: dict[str, str] = {}  # name → its buffer at this point of the plan
    actions: list[Action] = []
    tensors: dict[str, Tensor] = {}
    uploads: dict[str, tuple[str, int | None]] = {}
    constants: dict[str, Constant] = {}
    downloads: dict[str, str] = {}

    def buffer(name: str, suffix: str = "") -> str:
        now[name] = name + suffix
        tensors[now[name]] = known[name]
        return now[name]

    def current(name: str) -> str:
        return now[name] if name in now else buffer(name)

    for operation in plan.operations:
        match operation:
            case Upload(name, row):
                uploads[buffer(name, "" if row is None else f"[{row}]")] = (name, row)
                actions.append(ToDevice(now[name]))
            case Constant(name, table, row):
                constants[buffer(name, f"[{table}][{row}]")] = operation
            case Copy(source, target):
                actions.append(OnDevice(current(source), current(target)))
            case Download(name):
                downloads[name] = current(name)
                actions.append(ToHost(now[name]))
            case Run(graph):
                _add(actions, _launch(operation, graphs[graph], current))
    return Recording(tuple(actions), _kept(actions), tensors, uploads, constants, downloads)


def _kept(actions: Iterable[Action]) -> frozenset[str]:
    """Return the buffers that are read before they are written, and written by a copy."""
    written: set[str] = set()
    read_first: set[str] = set()
    copied: set[str] = set()
    for action in actions:
        match action:
            case ToDevice(buffer):
                written.add(buffer)
            case OnDevice(_, target):
                copied.add(target)
            case Together(launches):
                read_first |= {b for one in launches for _, b in one.inputs} - written
                written |= {b for one in launches for _, b in one.outputs}
    return frozenset(read_first & copied)


def _launch(run: Run, graph: Graph, current: Callable[[str], str]) -> Launch:
    names = [t.name for t in (*graph.inputs, *graph.outputs)]
    buffers = [(name, current(buffer)) for name, (buffer, _) in zip(names, ends(run, graph), strict=True)]
    count = len(graph.inputs)
    return Launch(run.graph, tuple(buffers[:count]), tuple(buffers[count:]))


def _add(actions: list[Action], launch: Launch) -> None:
    """Let a launch join the last ones if it is independent of them all and none runs its graph, which has one
    context."""
    last = actions[-1] if actions else None
    if isinstance(last, Together) and all(launch.is_independent(o) and launch.graph != o.graph for o in last.launches):
        actions[-1] = Together((*last.launches, launch))
    else:
        actions.append(Together((launch,)))


def scratch(actions: Iterable[Action], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return where in one shared block each graph's scratch memory lies, and the block's size, in bytes.

    Graphs that run one after the other share it; those that may run at the same time lie side by side. A graph
    that is in none of the actions starts at 0.
    """
    offsets = dict.fromkeys(sizes, 0)
    together = [sorted(launch.graph for launch in a.launches) for a in actions if isinstance(a, Together)]
    moved = True
    while moved:  # a graph that moves up may push those beside it, also in another group
        moved = False
        for graphs in together:
            end = 0
            for graph in graphs:
                moved |= offsets[graph] < end
                offsets[graph] = max(end, offsets[graph])
                end = -(-(offsets[graph] + sizes[graph]) // ALIGNMENT) * ALIGNMENT
    return offsets, max((offsets[g] + sizes[g] for g in sizes), default=0)
