"""What a chain does for one call, as a plain value: uploads, launches, copies, downloads, in order.

Wiring is name equality: every name is one buffer. A plan says nothing about arrays or devices, so a host
backend interprets it and a GPU backend can capture it, and a test can read it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from turbochain.runtime.bundle.manifest import Chain, Graph
from turbochain.runtime.chain.wiring import made_by


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
    columns = [name for name in (*chain.table_inputs, *made_by(chain.once, graphs)) if name in wanted]
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
