"""Check that the stages of a chain fit together: wiring is name equality.

An output and every input of the same name in the chain are one buffer. A stage may rename its graph's tensors
(`wires`), so that one graph serves two places. Everything is checked for every combination of the chain's modes.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import combinations

from turbochain.runtime.bundle.manifest import (
    FEEDS,
    JUDGED,
    PER,
    PLACES,
    SCALES,
    TEXTS,
    Chain,
    Feed,
    Graph,
    Stage,
    Tensor,
)

Graphs = Mapping[str, Graph]
WHEN = ("call", "step", "held")


def inputs(stage: Stage, graphs: Graphs) -> list[Tensor]:
    """Return what a stage reads, with the names that the chain has for it."""
    return [_renamed(t, stage) for t in graphs[stage.graph].inputs]


def outputs(stage: Stage, graphs: Graphs) -> list[Tensor]:
    """Return what a stage makes, with the names that the chain has for it."""
    return [_renamed(t, stage) for t in graphs[stage.graph].outputs]


def _renamed(tensor: Tensor, stage: Stage) -> Tensor:
    name = stage.wires.get(tensor.name)
    return tensor if name is None else replace(tensor, name=name)


def tensors(chain: Chain, graphs: Graphs) -> dict[str, Tensor]:
    """Return every tensor of the chain by name, in all modes; the wiring must be sound."""
    return {t.name: t for stage in chain.stages for t in (*inputs(stage, graphs), *outputs(stage, graphs))}


def problems(name: str, chain: Chain, graphs: Graphs) -> list[str]:
    """Return every contradiction in a chain as a sentence; none if its wiring is sound."""
    if missing := [g for g in chain.graphs if g not in graphs]:
        return [f"chain {name} names the graph {g}, which the bundle lacks" for g in missing]
    found = [*_vocabulary(chain, graphs), *_ends(chain, graphs)]
    for count in range(len(chain.modes) + 1):
        for modes in combinations(chain.modes, count):
            found += _of_modes(chain, graphs, modes)
    return [f"chain {name}: {problem}" for problem in dict.fromkeys(found)]


def _vocabulary(chain: Chain, graphs: Graphs) -> Iterator[str]:
    """Find the words of a chain that the format does not have."""
    places = [PLACES.index(s.when) if s.when in PLACES else -1 for s in chain.stages]
    if sorted(places) != places:
        yield f"its stages are not in the order {', '.join(PLACES)}"
    for stage in chain.stages:
        of_stage: tuple[tuple[str, Collection[str]], ...] = ((stage.when, PLACES), (stage.judged, JUDGED))
        for value, known in of_stage:
            if value not in known:
                yield f"the stage {stage.graph} has {value!r}, and one of {', '.join(known)} was expected"
        for mode in (*stage.if_, *stage.unless):
            if mode not in chain.modes:
                yield f"the stage {stage.graph} depends on the mode {mode!r}, which the chain lacks"
        ends = {t.name for t in (*graphs[stage.graph].inputs, *graphs[stage.graph].outputs)}
        if unknown := sorted(stage.wires.keys() - ends):
            yield f"the stage {stage.graph} renames {unknown[0]}, which its graph lacks"
    for feed, how in chain.feeds.items():
        of_feed: tuple[tuple[str, Collection[str]], ...] = (
            *((how.is_, FEEDS), (how.when, WHEN)),
            *((how.scale, SCALES), (how.of, TEXTS)),
        )
        for value, known in of_feed:
            if value not in known:
                yield f"the feed {feed} has {value!r}, and one of {', '.join(known)} was expected"
        if how.is_ in FEEDS and how.when in WHEN and how.when not in FEEDS[how.is_]:
            yield f"the feed {feed} is {how.is_} {how.when!r}, and {' or '.join(FEEDS[how.is_])} was expected"
    for draw in chain.draws:
        if draw.per not in PER:
            yield f"the draw {draw.name} has {draw.per!r}, and one of {', '.join(PER)} was expected"
    read = {t.name for stage in chain.stages for t in inputs(stage, graphs)}
    for feed in sorted(chain.feeds.keys() - read):
        yield f"nothing reads the feed {feed}"


def _ends(chain: Chain, graphs: Graphs) -> Iterator[str]:
    """Find tensors of one name that differ, in whatever mode."""
    first: dict[str, tuple[Tensor, str]] = {}
    for stage in chain.stages:
        for tensor in (*inputs(stage, graphs), *outputs(stage, graphs)):
            other, owner = first.setdefault(tensor.name, (tensor, stage.graph))
            if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
                yield (
                    f"{tensor.name} is {other.dtype}{list(other.shape)} in {owner} "
                    f"and {tensor.dtype}{list(tensor.shape)} in {stage.graph}"
                )


def fed(chain: Chain, graphs: Graphs, modes: Collection[str]) -> dict[str, Feed]:
    """Return the feeds of a call with these modes: all but zeros under a name that one of its stages makes."""
    made = {t.name for s in chain.stages if s.runs(modes) for t in outputs(s, graphs)}
    return {name: feed for name, feed in chain.feeds.items() if not (feed.is_ == "zeros" and name in made)}


def _of_modes(chain: Chain, graphs: Graphs, modes: tuple[str, ...]) -> Iterator[str]:
    """Find what is wrong in a call with these modes: names made twice, inputs without a source, loose ends."""
    stages = [s for s in chain.stages if s.runs(modes)]
    given = fed(chain, graphs, modes)
    known = {name for name, feed in given.items() if feed.when != "step"}
    made: dict[str, str] = dict.fromkeys(given, "the caller")
    for stage in stages:
        if stage.when == "step":
            known |= given.keys()
        for tensor in inputs(stage, graphs):
            if tensor.name not in known:
                yield f"the input {tensor.name} of {stage.graph} has no source"
        for tensor in outputs(stage, graphs):
            if tensor.name in made:
                yield f"{tensor.name} is produced twice, by {made[tensor.name]} and {stage.graph}"
            made[tensor.name] = stage.graph
            known.add(tensor.name)
    if chain.output not in known - chain.feeds.keys():
        yield f"no graph produces its output {chain.output}"
    yield from _loop(chain, graphs, stages)


def _loop(chain: Chain, graphs: Graphs, stages: list[Stage]) -> Iterator[str]:
    """Find ends of `carry` and `keep` that do not join what they should, or that differ."""
    made = {t.name: t for s in stages for t in outputs(s, graphs)}
    in_loop = {t.name for s in stages if s.when == "step" for t in outputs(s, graphs)}
    read = {t.name: t for s in stages if s.when == "step" for t in inputs(s, graphs)}
    before = {t.name for s in stages if s.when in ("prompt", "image") for t in outputs(s, graphs)}
    starts = before | {name for name, feed in chain.feeds.items() if feed.when == "call"}
    held = {t.name: t for s in stages for t in inputs(s, graphs) if t.name in chain.feeds}
    held = {name: tensor for name, tensor in held.items() if chain.feeds[name].when == "held"}
    if not chain.carry and any(table.rows > 1 for table in chain.tables.values()):
        yield "the chain carries nothing from one step to the next"
    for source, target in chain.carry.items():
        if source not in in_loop or target not in read or target not in starts:
            yield f"carry {source} → {target} does not join an output and an input of the loop"
        elif (made[source].dtype, made[source].shape) != (read[target].dtype, read[target].shape):
            yield f"carry {source} → {target} joins tensors of different dtype or shape"
    for source, target in chain.keep.items():
        if source not in made or target not in held:
            yield f"keep {source} → {target} does not join something that is made and a held feed"
        elif (made[source].dtype, made[source].shape) != (held[target].dtype, held[target].shape):
            yield f"keep {source} → {target} joins tensors of different dtype or shape"
