"""`build`: a source → a bundle with an engine for this machine, checked against diffusers.

A bundle is made in `NAME.bundle.partial/` and renamed when whole; an engine in `engines/.building/` and renamed
when verified. Both folders are locked while in use. What is finished is written down with its hashes, so an
interrupted build goes on where it stopped.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbochain.engines import compiling
from turbochain.engines import options as backend_options
from turbochain.engines.order import BuildOrder, engine_order
from turbochain.export.api import make, path_of
from turbochain.export.order import ExportOrder, How
from turbochain.export.phases.phases import LOG, PhaseReport, Phases
from turbochain.runtime import backends
from turbochain.runtime.bundle.manifest import Check


@dataclass
class BuildResult:
    """What a build did."""

    bundle: Path
    engine: str  # the folder's name in engines/
    precision: dict[str, str]  # graph → what its engine computes in
    remedy: dict[str, str]  # graph → what makes it right in fp16, or why it is not in fp16; "" for nothing
    engine_bytes: dict[str, int]  # graph → bytes that the engine reads
    build_seconds: dict[str, float]  # graph → compilation
    checks: list[Check]  # empty where the engine is for another machine, and has not met one such yet
    phases: list[PhaseReport] = field(default_factory=list)  # empty where there was nothing to do
    backend: str = ""
    reason: str = ""  # why this backend


def build(
    source: str,
    output: str | Path | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    target: str | None = None,
    precision: str | None = None,
    vae_precision: str | None = None,
    vae: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    steps: Sequence[int] | None = None,
    opset: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    options: Mapping[str, object] | None = None,
    timing_cache: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> BuildResult:
    """Build `output` (default: the source's name + ".bundle", here) with an engine for this machine.

    `source`: a hub id, a local folder in diffusers' format, "demo" (the small trained model that comes with
    this package), "synthetic:NAME", or a bundle. `backend`: default the best for this machine. `device`: of this
    machine, such as "cpu" or "cuda:1". `target`: build for another machine's GPU, such as "sm89" (TensorRT-RTX);
    the engine is verified when it is first loaded there.
    `precision`: "fp32" or "fp16" (default: the backend's); where fp16 would overflow, the stage gets a remedy
    (`BuildResult.remedy`). `vae_precision`: "fp32" or "bf16", for the VAE instead. `vae`: another VAE than the
    checkpoint's own, "tiny" (the family's AutoencoderTiny, many times faster, pictures slightly softer), a hub id or
    a local folder; what diffusers makes with it is then the reference. `size`: width and height in
    pixels, multiples of 64 (default 512×512). `steps`: step counts (default 1 to 4). `opset`: of the ONNX graphs,
    18 to 23 (default 21). `options`: the backend's own, such as {"builder_optimization_level": 5}; see `OPTIONS`
    in its module in `turbochain.engines`. `timing_cache`: the folder where TensorRT's timings are kept and found,
    one file per GPU and library version (default: the folder that the bundle is in). `force` skips the check of
    memory and disk. A second call with the same arguments finds the result and does nothing. Raises InputError
    for what cannot be built, VerificationError where the engine differs from diffusers by more than its bounds
    (the engine is then not installed).
    """
    counts = None if steps is None else tuple(steps)
    export = ExportOrder(source, precision, vae_precision, vae, size, batch, counts, opset, revision, variant)
    engine = engine_order(backend, device, target, options, timing_cache, precision)
    return carry_out(BuildOrder(export, engine, How(path_of(export, output), force, quiet, verbose)))


def carry_out(order: BuildOrder) -> BuildResult:
    """Build what was ordered, unless it is there; raises as `build`."""
    engine, how = order.engine, order.how
    where = compiling.device(engine.backend, engine.device, engine.target)
    backend_options.settled(engine.backend, engine.options)  # what this machine cannot do is told before the work
    if not how.quiet:
        print(f"backend {engine.backend} on {where}: {engine.reason}", file=sys.stderr)
    for precision in filter(None, (order.export.precision, order.export.vae_precision)):
        backends.require_precision(engine.backend, where, precision)
    usual = backends.preference(engine.backend, where).precisions[0]
    reports: list[PhaseReport] = []
    with make(order.export, how, usual, reports) as (lock, bundle):
        graphs = bundle.manifest.graphs
        if where.kind == "cuda" and usual not in {g.precision for g in graphs.values()} and not how.quiet:
            print(f"the bundle is not in {usual}, so neither is its engine: export it again for speed", file=sys.stderr)
        phases = Phases(lock, None if how.verbose else how.output / "engines" / LOG, how.quiet, reports)
        name, made = compiling.install(phases, bundle, engine)
        return BuildResult(
            bundle=how.output,
            engine=name,
            precision=backends.precisions(engine.backend, made.options, {g: graphs[g] for g in bundle.chain.graphs}),
            remedy={g: graphs[g].remedy for g in bundle.chain.graphs},
            engine_bytes=made.bytes,
            build_seconds=made.build_seconds,
            checks=list(made.checks),
            phases=reports,
            backend=engine.backend,
            reason=engine.reason,
        )
