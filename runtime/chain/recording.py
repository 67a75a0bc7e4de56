"""A plan as a GPU carries it out: which buffer each name is at each moment, and what may run at the same time.

A pure value: the executor puts its actions on a stream in this order, once directly and once to be captured.
What differs from step to step (noise, the schedule's columns) has a buffer of its own for each row, so that every
address in the captured graph is fixed; everything else is one buffer per name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from turbochain.runtime.backends.cuda import ALIGNMENT
from turbochain.runtime.bundle.manifest import Graph, Tensor
from turbochain.runtime.chain.plan import Constant, Copy, Download, Plan, Run, Upload


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
    """One launch of a graph; `buffers` says which buffer each of its inputs and outputs is."""

    graph: str
    buffers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Together:
    """Launches of which none reads or overwrites what another one writes: they may run at the same time."""

    launches: tuple[Launch, ...]


Action = ToDevice | ToHost | OnDevice | Together


@dataclass(frozen=True)
class Recording:
    """What one plan is on a GPU."""

    actions: tuple[Action, ...]
    tensors: Mapping[str, Tensor]  # buffer → what it holds
    uploads: Mapping[str, tuple[str, int | None]]  # buffer → the feed that fills it, and which row of it
    constants: Mapping[str, tuple[str, int]]  # buffer → the column of the schedule that it holds a row of
    downloads: Mapping[str, str]  # result → its buffer


def record(plan: Plan, graphs: Mapping[str, Graph]) -> Recording:
    """What a plan is on a GPU."""
    known = {t.name: t for o in plan if isinstance(o, Run) for t in (*graphs[o.graph].inputs, *graphs[o.graph].outputs)}
    now: dict[str, str] = {}  # name → its buffer at this point of the plan
    actions: list[Action] = []
    tensors: dict[str, Tensor] = {}
    uploads: dict[str, tuple[str, int | None]] = {}
    constants: dict[str, tuple[str, int]] = {}
    downloads: dict[str, str] = {}

    def buffer(name: str, row: int | None = None) -> str:
        now[name] = name if row is None else f"{name}[{row}]"
        tensors[now[name]] = known[name]
        return now[name]

    def current(name: str) -> str:
        return now[name] if name in now else buffer(name)

    for operation in plan:
        match operation:
            case Upload(name, row):
                uploads[buffer(name, row)] = (name, row)
                actions.append(ToDevice(now[name]))
            case Constant(name, row):
                constants[buffer(name, row)] = (name, row)
            case Copy(source, target):
                actions.append(OnDevice(current(source), current(target)))
            case Download(name):
                downloads[name] = current(name)
                actions.append(ToHost(now[name]))
            case Run(graph):
                ends = (*graphs[graph].inputs, *graphs[graph].outputs)
                launch = Launch(graph, tuple((t.name, current(t.name)) for t in ends))
                last = actions[-1] if actions else None
                if isinstance(last, Together) and _independent(launch, last.launches, graphs):
                    actions[-1] = Together((*last.launches, launch))
                else:
                    actions.append(Together((launch,)))
    return Recording(tuple(actions), tensors, uploads, constants, downloads)


def _independent(launch: Launch, others: Iterable[Launch], graphs: Mapping[str, Graph]) -> bool:
    def written(one: Launch) -> set[str]:
        outputs = {t.name for t in graphs[one.graph].outputs}
        return {buffer for name, buffer in one.buffers if name in outputs}

    touched = {buffer for _, buffer in launch.buffers}
    return all(
        not touched & written(other) and not written(launch) & {buffer for _, buffer in other.buffers}
        for other in others
    )


def scratch(actions: Iterable[Action], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where in one shared block each graph's scratch memory lies, and the block's size, in bytes.

    Graphs that run one after the other share it; those that may run at the same time lie side by side. A graph
    that is in none of the actions starts at 0.
    """
    offsets = dict.fromkeys(sizes, 0)
    for action in actions:
        if isinstance(action, Together):
            end = 0
            for launch in action.launches:
                offsets[launch.graph] = end
                end += -(-sizes[launch.graph] // ALIGNMENT) * ALIGNMENT
    return offsets, max((offsets[g] + sizes[g] for g in sizes), default=0)
