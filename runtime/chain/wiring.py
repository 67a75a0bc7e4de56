"""Check that the stages of a chain fit together."""

from collections.abc import Iterable, Iterator, Mapping

from turbochain.runtime.bundle.manifest import Chain, Graph, Tensor


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


def made_by(names: Iterable[str], graphs: Mapping[str, Graph]) -> list[str]:
    """The outputs of these graphs."""
    return [t.name for g in names for t in graphs[g].outputs]


def _without_source(chain: Chain, graphs: Mapping[str, Graph]) -> Iterator[tuple[str, str]]:
    """Every graph and input of it that nothing has fed or made when the graph runs."""
    per_step = (*chain.step_inputs, *chain.table_inputs, *made_by(chain.once, graphs))
    known: set[str] = set()
    for g in chain.once:
        yield from ((g, t.name) for t in graphs[g].inputs if t.name not in chain.table_inputs)
    for group, fed in ((chain.before, chain.inputs), (chain.loop, per_step), (chain.after, ())):
        known.update(fed)
        for g in group:
            yield from ((g, t.name) for t in graphs[g].inputs if t.name not in known)
            known.update(made_by([g], graphs))


def _carry_problems(name: str, chain: Chain, graphs: Mapping[str, Graph]) -> list[str]:
    """What is carried starts as something fed once, or made before the loop, and its two ends are alike."""
    starts = {*chain.inputs, *made_by(chain.before, graphs)}
    produced = {t.name: t for g in chain.loop for t in graphs[g].outputs}
    read = {t.name: t for g in chain.loop for t in graphs[g].inputs}
    problems = []
    for source, target in chain.carry.items():
        if source not in produced or target not in read or target not in starts:
            problems.append(f"chain {name}: carry {source} → {target} does not join an output and an input of the loop")
        elif (produced[source].dtype, produced[source].shape) != (read[target].dtype, read[target].shape):
            problems.append(f"chain {name}: carry {source} → {target} joins tensors of different dtype or shape")
    return problems
