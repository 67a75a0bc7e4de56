"""Show where the time of each stage goes, by kind of operator: `turbochain bench --profile`, on a CPU."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turbochain.runtime import selection
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.commands import console
from turbochain.runtime.commands.bench import PROMPT
from turbochain.runtime.errors import InputError
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.stream import drawing

SHOWN = 8


@dataclass(frozen=True)
class Operator:
    """The operators of one kind in one launch of a graph."""

    kind: str  # as the backend names it
    count: int
    seconds: float


def profile(
    path: str | Path,
    *,
    chain: str | None = None,
    runs: int = 3,
    steps: int | None = None,
    strength: float | None = None,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    engines: str | Path | None = None,
    threads: int | None = None,
    trust_engines: bool = False,
) -> dict[str, list[Operator]]:
    """Return graph → its operators by kind, the slowest first: means over `runs` pictures, by the backend's profiler.

    `engine`: the one with this folder name. `strength`: of a chain that starts from an image. A profiled graph is
    slower than one that is not. Raises what Pipeline.load raises, and InputError on a GPU.
    """
    bundle = Bundle.open(path, trust_engines=trust_engines)
    opened = bundle.open_chain(chain)
    found = selection.select(opened, backend, device, engine, engines)
    if found.engine.key.device != "cpu":
        raise InputError("operators are profiled on a CPU only: on a GPU, run turbochain bench under nsys")
    executor = selection.open_executor(bundle, found, device=device, threads=threads, profile=True)
    with Pipeline(bundle, found, executor) as pipe:
        request = Request.sample(opened, steps, PROMPT, strength)
        draw = drawing(pipe, request)
        for _ in range(runs):
            pipe.forget()
            draw()
        return {graph: by_kind(executor.operators(graph)) for graph in opened.graphs if graph in executor.loaded}


def by_kind(operators: Iterable[tuple[str, float]]) -> list[Operator]:
    """Sum the operators by kind; `operators`: each one's kind and its seconds in one launch."""
    found: dict[str, list[float]] = defaultdict(list)
    for kind, seconds in operators:
        found[kind].append(seconds)
    made = (Operator(kind, len(each), sum(each)) for kind, each in found.items())
    return sorted(made, key=lambda operator: -operator.seconds)


def as_text(found: dict[str, list[Operator]]) -> str:
    """Return a table of the slowest kinds of each graph."""
    rows = [["stage", "operator", "count", "ms", "share"]]
    for graph, operators in found.items():
        whole = sum(operator.seconds for operator in operators)
        for i, o in enumerate(operators[:SHOWN]):
            figures = [str(o.count), f"{1e3 * o.seconds:.2f}", f"{o.seconds / whole:.1%}"]
            rows.append([graph if i == 0 else "", o.kind, *figures])
    return console.table(rows, left=2)
