"""`build`: a source → a bundle with an engine for this machine, checked against diffusers.

A bundle is made in `NAME.bundle.partial/` and renamed when whole; an engine in `engines/.building/` and renamed
when verified. Both folders are locked while in use. What is finished is written down with its hashes, so an
interrupted build goes on where it stopped.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from turbochain.engines import backends as builders
from turbochain.engines import compiling, installed
from turbochain.engines.order import BuildOrder, engine_order
from turbochain.export import recipes
from turbochain.export.api import is_bundle, locked, make, path_of
from turbochain.export.options import ExportOptions
from turbochain.export.order import ExportOrder, How
from turbochain.export.phases.phases import LOG, PhaseReport, Phases
from turbochain.runtime import backends, selection
from turbochain.runtime.bundle import quantization
from turbochain.runtime.bundle.manifest import Check, Engine
from turbochain.runtime.bundle.opened import Bundle


@dataclass
class BuildResult:
    """The result of a build: paths, figures and checks."""

    bundle: Path
    engine: str  # the name of its folder
    folder: Path  # the engine's
    precision: dict[str, str]  # graph → what the engine computes it in
    remedy: dict[str, str]  # graph → what makes it right in fp16, or why it is not in fp16; "" for nothing
    engine_bytes: dict[str, int]  # graph → bytes that the engine reads
    build_seconds: dict[str, float]  # graph → compilation
    checks: dict[str, list[Check]]  # chain → its verification; a chain that is missing is verified at its first load
    int8: dict[str, tuple[int, int]]  # graph in int8 → how many of its layers are, and of how many
    phases: list[PhaseReport] = field(default_factory=list)  # empty if there was nothing to do
    backend: str = ""
    reason: str = ""  # why this backend


def build(
    source: str | None = None,
    output: str | Path | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    target: str | None = None,
    options: Mapping[str, object] | None = None,
    timing_cache: str | Path | None = None,
    chains: Sequence[str] | None = None,
    engines: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **bundle: Unpack[ExportOptions],
) -> BuildResult:
    """Build `output` (default: the source's name + ".bundle", here) with an engine for this machine.

    `source`: as `turbochain.export.export` has it, or a bundle. `bundle`: what bundle to make, see `ExportOptions`; the
    default of `precision` is the backend's. `backend`: default the best for this machine. `device`: of this machine,
    such as "cpu" or "cuda:1". `target`: build for another machine's GPU, such as "sm89" (TensorRT-RTX); the engine is
    verified when it is first loaded there. `options`: the backend's own, such as {"builder_optimization_level": 5}; see
    `BUILDER` in its module in `turbochain.engines.backends`. `timing_cache`: the folder for TensorRT's timings, one
    file per GPU and library version (default: beside the bundle, or beside `engines`). `chains`: compile and verify
    only the graphs of these chains (default: all of the bundle's); a later call with others adds theirs. `engines`: the
    folder of this bundle's engines (default: its own, or the user's cache if it is read-only). `force` skips the check
    of memory and disk. A second call with the same arguments finds the result and does nothing. Raises InputError for
    what cannot be built, VerificationError if the engine differs from diffusers by more than its bounds (the engine is
    then not installed).
    """
    export = recipes.settle(ExportOrder.of(source, bundle))
    precision = bundle.get("precision")
    engine = engine_order(backend, device, target, options, timing_cache, precision, chains, engines)
    return carry_out(BuildOrder(export, engine, How(path_of(export, output), force, quiet, verbose)))


def carry_out(order: BuildOrder) -> BuildResult:
    """Build the order's bundle and engine, or find them finished. Raises the errors of `build`."""
    engine, how = order.engine, order.how
    where = installed.device(engine.backend, engine.device, engine.target)
    builders.get(engine.backend).settle(engine.options)  # refuse options that this machine lacks before any work
    if not (is_bundle(order.export.source) or is_bundle(how.output)):
        installed.check_chains(engine.chains, order.export.chain_names(), how.output)
    if not how.quiet:
        print(f"backend {engine.backend} on {where}: {engine.reason}", file=sys.stderr)
    for precision in filter(None, (order.export.precision, order.export.vae_precision)):
        backends.require_precision(engine.backend, where, precision)
    usual = backends.preference(engine.backend, where).precisions[0]
    reports: list[PhaseReport] = []
    with make(order.export, how, usual, reports) as bundle:
        graphs = bundle.manifest.graphs
        if where.kind == "cuda" and usual not in {g.precision for g in graphs.values()} and not how.quiet:
            print(f"the bundle is not in {usual}, so neither is its engine: export it again for speed", file=sys.stderr)
        folder = selection.folder_to_write(bundle, engine.engines)
        with locked(folder, how.quiet) as lock:
            phases = Phases(lock, None if how.verbose else folder / LOG, how.quiet, reports)
            found = compiling.install(phases, bundle, engine, folder)
        made = found.engine
        compiled = {name: graphs[name] for name in made.graphs}
        return BuildResult(
            bundle=how.output,
            engine=found.name,
            folder=found.folder,
            precision=backends.precisions(engine.backend, made.options, compiled),
            remedy={name: graph.remedy for name, graph in compiled.items()},
            engine_bytes={name: graph.bytes for name, graph in made.graphs.items()},
            build_seconds={name: graph.build_seconds for name, graph in made.graphs.items()},
            checks={chain: list(checks) for chain, checks in made.checks.items()},
            int8=_in_int8(bundle, made),
            phases=reports,
            backend=engine.backend,
            reason=engine.reason,
        )


def _in_int8(bundle: Bundle, made: Engine) -> dict[str, tuple[int, int]]:
    """Return how many layers of an engine are in int8, see `BuildResult`; its build may have added to the bundle."""
    if not quantization.of(bundle.manifest.graphs, made.options):
        return {}
    return quantization.count(Bundle.open(bundle.path), made.key.backend, made.options, made.graphs)
