"""The plan of one call, as a plain value: uploads, launches, copies, downloads, in order.

A plan says nothing about arrays or devices, so a CPU backend interprets it, a GPU backend can capture it, and a test
can read it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from turbochain.runtime.bundle.manifest import Chain, Graph, Stage, Tensor
from turbochain.runtime.chain import wiring


@dataclass(frozen=True)
class Upload:
    """The caller's array → the buffer of the same name; `row` picks the step of a per-step array."""

    name: str
    row: int | None = None


@dataclass(frozen=True)
class Constant:
    """A row of a table's column → the buffer of the same name. It never changes: a GPU keeps it there."""

    name: str
    table: str  # whose column it is; equal names and rows of two tables are two constants
    row: int


@dataclass(frozen=True)
class Run:
    """One launch of a graph; `wires` names the buffers that differ from the graph's own names."""

    graph: str
    wires: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Copy:
    """One buffer → another of the same dtype and shape (what goes round the loop, or is kept for the next call)."""

    source: str
    target: str


@dataclass(frozen=True)
class Download:
    """A buffer → the caller."""

    name: str


Operation = Upload | Constant | Run | Copy | Download


@dataclass(frozen=True)
class Plan:
    """The operations of one call. Equal plans do the same, so a backend prepares each once."""

    operations: tuple[Operation, ...]

    @cached_property
    def graphs(self) -> tuple[str, ...]:
        """Return the graphs that it runs, each once."""
        return tuple(dict.fromkeys(o.graph for o in self.operations if isinstance(o, Run)))

    @cached_property
    def _hash(self) -> int:
        return hash(self.operations)

    def __hash__(self) -> int:
        """Return the hash of the operations, computed once: a plan is looked up in every call."""
        return self._hash

    def __str__(self) -> str:
        """Return what it runs: "the plan of text_encoder, 2 unet, 2 step, vae_decoder"."""
        launches = Counter(o.graph for o in self.operations if isinstance(o, Run))
        return "the plan of " + ", ".join(f"{n} {graph}" if n > 1 else graph for graph, n in launches.items())

    def written(self, graphs: Mapping[str, Graph]) -> set[Tensor]:
        """Return the buffers that it fills with something of its own: uploads, and what graphs make."""
        known, made = self.tensors(graphs), {o.name for o in self.operations if isinstance(o, Upload)}
        for run in (o for o in self.operations if isinstance(o, Run)):
            made |= {name for name, _ in ends(run, graphs[run.graph])[len(graphs[run.graph].inputs) :]}
        return {known[name] for name in made}

    def tensors(self, graphs: Mapping[str, Graph]) -> dict[str, Tensor]:
        """Return every buffer that it touches, by name."""
        runs = [o for o in self.operations if isinstance(o, Run)]
        found = {name: t for run in runs for name, t in ends(run, graphs[run.graph])}
        for o in self.operations:
            if isinstance(o, Copy):  # what is kept for the next call may be read by that one alone
                found.setdefault(o.target, replace(found[o.source], name=o.target))
        return found


def ends(run: Run, graph: Graph) -> list[tuple[str, Tensor]]:
    """Return the buffer of each input and output of a launch: its name, and what it holds (under that name)."""
    wires = dict(run.wires)
    named = ((wires.get(t.name, t.name), t) for t in (*graph.inputs, *graph.outputs))
    return [(name, replace(t, name=name)) for name, t in named]


def plan(
    chain: Chain,
    graphs: Mapping[str, Graph],
    rows: int,
    *,
    table: str,
    modes: Collection[str] = (),
    given: Collection[str] = (),
    downloads: Iterable[str] = (),
    decode: bool = True,
) -> Plan:
    """Return the plan of a whole call: `rows` evaluations with the constants of `table`, in these modes.

    `given` names tensors that the caller uploads instead of running the stage that makes them: a stage before the loop
    whose outputs are all given is left out. `downloads` are read back besides the output. Without `decode` the stages
    of the end are left out, with the output and what is kept of it.
    """
    stages = [s for s in chain.stages if s.runs(modes) and not _is_given(s, graphs, given)]
    left_out = [] if decode else [s for s in stages if s.when == "end"]
    stages = [s for s in stages if s not in left_out]
    lost = {t.name for s in left_out for t in wiring.outputs(s, graphs)}
    before, loop, after = (
        [s for s in stages if s.when in places] for places in (("prompt", "image"), ("step",), ("end",))
    )
    wanted = {t.name for s in stages for t in wiring.inputs(s, graphs)}
    feeds = {name: feed for name, feed in wiring.fed(chain, graphs, modes).items() if name in wanted}
    columns = {when: [n for n, f in feeds.items() if f.is_ == "column" and f.when == when] for when in ("call", "step")}
    uploads = {when: [n for n, f in feeds.items() if f.is_ != "column" and f.when == when] for when in ("call", "step")}
    operations: list[Operation] = [Upload(name) for name in (*uploads["call"], *given) if name in wanted]
    operations += [Constant(name, table, 0) for name in columns["call"]]
    operations += [_run(s) for s in before]
    for row in range(rows):
        if row:
            operations += [Copy(source, target) for source, target in chain.carry.items()]
        operations += [Upload(name, row) for name in uploads["step"]]
        operations += [Constant(name, table, row) for name in columns["step"]]
        operations += [_run(s) for s in loop]
    operations += [_run(s) for s in after]
    operations += [Copy(source, target) for source, target in chain.keep.items() if source not in lost]
    return Plan((*operations, *(Download(name) for name in (*downloads, chain.output) if name not in lost)))


def graph_plan(name: str, graph: Graph) -> Plan:
    """Return the plan of one graph alone: upload every input, run, download every output."""
    return Plan(
        (
            *(Upload(t.name) for t in graph.inputs),
            Run(name),
            *(Download(t.name) for t in graph.outputs),
        )
    )


def _run(stage: Stage) -> Run:
    return Run(stage.graph, tuple(stage.wires.items()))


def _is_given(stage: Stage, graphs: Mapping[str, Graph], given: Collection[str]) -> bool:
    return stage.when in ("prompt", "image") and all(t.name in given for t in wiring.outputs(stage, graphs))
