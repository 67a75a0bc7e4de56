"""What a chain does for one call, as a plain value: uploads, launches, copies, downloads, in order.

Wiring is name equality: every name is one buffer. A plan says nothing about arrays or devices, so a host
backend interprets it and a GPU backend can capture it, and a test can read it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from turbochain.runtime.manifest import Chain, Graph, Tensor


@dataclass(frozen=True)
class Upload:
    """Caller's array → the buffer of the same name; `row` picks the step of a per-step array."""

    name: str
    row: int | None = None


@dataclass(frozen=True)
class Constant:
    """A row of a column → the buffer of the same name. It never changes: a GPU keeps it there.

    Columns are those of the schedule and those that the chain's `once` graphs made of them at load.
    """

    name: str
    row: int


@dataclass(frozen=True)
class Run:
    """One launch of a graph on the buffers that its inputs and outputs name."""

    graph: str


@dataclass(frozen=True)
class Copy:
    """One buffer to another of the same dtype and shape (what goes round the loop)."""

    source: str
    target: str


@dataclass(frozen=True)
class Download:
    """A buffer → the caller."""

    name: str


Operation = Upload | Constant | Run | Copy | Download
Plan = tuple[Operation, ...]


def plan(
    chain: Chain,
    graphs: Mapping[str, Graph],
    steps: int,
    *,
    given: Collection[str] = (),
    downloads: Iterable[str] = (),
) -> Plan:
    """The whole chain for `steps` steps, but for the graphs in `once`, which ran when the bundle was loaded.

    `given` names tensors that the caller uploads in place of running what makes them: a graph in
    `before` whose outputs are all given is left out. `downloads` are read back besides the output.
    """
    before = [g for g in chain.before if not all(o.name in given for o in graphs[g].outputs)]
    runs = [*before, *chain.loop, *chain.after]
    wanted = {i.name for g in runs for i in graphs[g].inputs}
    columns = [name for name in (*chain.table_inputs, *_made(chain.once, graphs)) if name in wanted]
    operations: list[Operation] = []
    operations += [Upload(name) for name in (*chain.inputs, *given) if name in wanted]
    operations += [Run(g) for g in before]
    for row in range(steps):
        if row:
            operations += [Copy(source, target) for source, target in chain.carry.items()]
        operations += [Upload(name, row) for name in chain.step_inputs]
        operations += [Constant(name, row) for name in columns]
        operations += [Run(g) for g in chain.loop]
    operations += [Run(g) for g in chain.after]
    return (*operations, *(Download(name) for name in (*downloads, chain.output)))


def stage_plan(graph: str, tensors: Graph) -> Plan:
    """One graph alone: upload every input, run, download every output."""
    return (
        *(Upload(t.name) for t in tensors.inputs),
        Run(graph),
        *(Download(t.name) for t in tensors.outputs),
    )


def buffers(chain: Chain, graphs: Mapping[str, Graph]) -> dict[str, Tensor]:
    """Every buffer of the chain by name (the wiring has been checked when the bundle was read)."""
    return {t.name: t for g in chain.graphs for t in (*graphs[g].inputs, *graphs[g].outputs)}


def wiring_problems(name: str, chain: Chain, graphs: Mapping[str, Graph]) -> list[str]:
    """Every contradiction in a chain, as sentences; empty when its wiring is sound."""
    missing = [g for g in chain.graphs if g not in graphs]
    if missing:
        return [f"chain {name} names the graph {g}, which the bundle lacks" for g in missing]
    problems: list[str] = []
    made: dict[str, str] = {}
    ends: dict[str, tuple[Tensor, str]] = {}
    fed = {*chain.inputs, *chain.step_inputs, *chain.table_inputs}
    for g in chain.graphs:
        for tensor in (*graphs[g].inputs, *graphs[g].outputs):
            other, owner = ends.setdefault(tensor.name, (tensor, g))
            if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                problems.append(
                    f"chain {name}: {tensor.name} is {other.dtype}{list(other.shape)} in {owner} "
                    f"and {tensor.dtype}{list(tensor.shape)} in {g}"
                )
        for t in graphs[g].outputs:
            if t.name in made or t.name in fed:
                problems.append(
                    f"chain {name}: {t.name} is produced twice, by {made.get(t.name, 'the caller')} and {g}"
                )
            made[t.name] = g
    problems += [f"chain {name}: the input {t} of {g} has no source" for g, t in _without_source(chain, graphs)]
    inputs = {t.name for g in chain.graphs for t in graphs[g].inputs}
    problems += [f"chain {name}: nothing reads the fed input {n}" for n in sorted(fed - inputs)]
    problems += _carry_problems(name, chain, graphs)
    if chain.output not in made:
        problems.append(f"chain {name}: no graph produces its output {chain.output}")
    return problems


def _made(names: Iterable[str], graphs: Mapping[str, Graph]) -> list[str]:
    """The outputs of these graphs."""
    return [t.name for g in names for t in graphs[g].outputs]


def _without_source(chain: Chain, graphs: Mapping[str, Graph]) -> Iterator[tuple[str, str]]:
    """Every graph and input of it that nothing has fed or made when the graph runs."""
    per_step = (*chain.step_inputs, *chain.table_inputs, *_made(chain.once, graphs))
    known: set[str] = set()
    for g in chain.once:
        yield from ((g, t.name) for t in graphs[g].inputs if t.name not in chain.table_inputs)
    for group, fed in ((chain.before, chain.inputs), (chain.loop, per_step), (chain.after, ())):
        known.update(fed)
        for g in group:
            yield from ((g, t.name) for t in graphs[g].inputs if t.name not in known)
            known.update(_made([g], graphs))


def _carry_problems(name: str, chain: Chain, graphs: Mapping[str, Graph]) -> list[str]:
    """What is carried starts as something fed once, or made before the loop, and its two ends are alike."""
    starts = {*chain.inputs, *_made(chain.before, graphs)}
    produced = {t.name: t for g in chain.loop for t in graphs[g].outputs}
    read = {t.name: t for g in chain.loop for t in graphs[g].inputs}
    problems = []
    for source, target in chain.carry.items():
        if source not in produced or target not in read or target not in starts:
            problems.append(f"chain {name}: carry {source} → {target} does not join an output and an input of the loop")
        elif (produced[source].dtype, produced[source].shape) != (read[target].dtype, read[target].shape):
            problems.append(f"chain {name}: carry {source} → {target} joins tensors of different dtype or shape")
    return problems
