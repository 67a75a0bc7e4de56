"""`build`: a source → a bundle with an engine for this machine, checked against diffusers.

A bundle is made in `NAME.bundle.partial/` and renamed when whole; an engine in `engines/.building/` and renamed
when verified. Both folders are locked while in use. What is finished is written down with its hashes, so an
interrupted build goes on where it stopped.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbochain.engines import backends as builders
from turbochain.engines import compiling, installed
from turbochain.engines.order import BuildOrder, engine_order
from turbochain.export import bundling
from turbochain.export.order import ExportOrder
from turbochain.export.phases.phases import LOG, PhaseReport, Phases
from turbochain.runtime import backends, selection
from turbochain.runtime.bundle.lock import lock_directory
from turbochain.runtime.bundle.manifest import Check
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import InputError

DEMO = "demo"  # turbochain.export.sources.checkpoint.DEMO


@dataclass
class BuildResult:
    """What a build did."""

    bundle: Path
    engine: str  # the name of its folder
    folder: Path  # the engine's
    precision: dict[str, str]  # graph → what the engine computes it in
    remedy: dict[str, str]  # graph → what makes it right in fp16, or why it is not in fp16; "" for nothing
    engine_bytes: dict[str, int]  # graph → bytes that the engine reads
    build_seconds: dict[str, float]  # graph → compilation
    checks: dict[str, list[Check]]  # chain → its verification; a chain that is missing is verified at its first load
    phases: list[PhaseReport] = field(default_factory=list)  # empty if there was nothing to do
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
    steps: list[int] | None = None,
    opset: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    options: Mapping[str, object] | None = None,
    timing_cache: str | Path | None = None,
    chains: Sequence[str] | None = None,
    engines: str | Path | None = None,
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
    one file per GPU and library version (default: the folder that the bundle is in). `chains`: compile and verify
    only the graphs of these chains (default: all of the bundle's); a later call with others adds theirs. `engines`:
    the folder of this bundle's engines (default: its own, or the user's cache if it is read-only). `force` skips the
    check of memory and disk. A second call with the same arguments finds the result and does nothing. Raises
    InputError for what cannot be built, VerificationError if the engine differs from diffusers by more than its
    bounds (the engine is then not installed).
    """
    export = ExportOrder(source, precision, vae_precision, vae, size, batch, steps, opset, revision, variant)
    engine = engine_order(backend, device, target, options, timing_cache, precision, chains, engines)
    where = None if output is None else Path(output)
    return carry_out(BuildOrder(export, engine, where, force, quiet, verbose))


def carry_out(order: BuildOrder) -> BuildResult:
    """Build what was ordered, unless it is there; raises as `build`."""
    engine, quiet, verbose = order.engine, order.quiet, order.verbose
    source, vae = order.export.source, order.export.vae
    where = installed.device(engine.backend, engine.device, engine.target)
    builders.get(engine.backend).settle(engine.options)  # what this machine cannot do is told before the work
    if not quiet:
        print(f"backend {engine.backend} on {where}: {engine.reason}", file=sys.stderr)
    asked = _asked(order.export)
    for precision in filter(None, (order.export.precision, order.export.vae_precision)):
        backends.require_precision(engine.backend, where, precision)
    output = order.output or _default_output(source)
    request = _request(source, asked, order.export.revision, order.export.variant, vae)
    phases: list[PhaseReport] = []

    def finish() -> BuildResult:
        bundle = Bundle.open(output)
        _check_same(bundle, source, request)
        graphs = bundle.manifest.graphs
        usual = backends.preference(engine.backend, where).precisions[0]
        if where.kind == "cuda" and usual not in {g.precision for g in graphs.values()} and not quiet:
            print(f"the bundle is not in {usual}, so neither is its engine: export it again for speed", file=sys.stderr)
        folder = selection.folder_to_write(bundle, engine.engines)
        with _locked(folder, quiet) as lock:
            run = Phases(lock, None if verbose else folder / LOG, quiet, phases)
            found = compiling.install(run, bundle, engine, folder)
        made = found.engine
        compiled = {name: graphs[name] for name in made.graphs}
        return BuildResult(
            bundle=output,
            engine=found.name,
            folder=found.folder,
            precision=backends.precisions(engine.backend, made.options, compiled),
            remedy={name: graph.remedy for name, graph in compiled.items()},
            engine_bytes={name: graph.bytes for name, graph in made.graphs.items()},
            build_seconds={name: graph.build_seconds for name, graph in made.graphs.items()},
            checks={chain: list(checks) for chain, checks in made.checks.items()},
            phases=phases,
            backend=engine.backend,
            reason=engine.reason,
        )

    if not _is_bundle(output):
        if output.exists():
            raise InputError(f"{output} exists and is not a bundle: choose another path with -o")
        partial = output.with_name(output.name + ".partial")
        with _locked(partial, quiet) as lock:
            if not _is_bundle(output):
                if _is_bundle(source):
                    bundling.copy(Bundle.open(source), partial, output)
                else:
                    run = Phases(lock, None if verbose else partial / LOG, quiet, phases)
                    request = {"precision": backends.preference(engine.backend, where).precisions[0], **request}
                    bundling.export(run, source, vae, request, partial, output, order.force)
                return finish()  # the folder was renamed, so its lock is now the bundle's
            partial.rmdir()  # the owner of the lock that we waited for made the bundle
    with _locked(output, quiet):
        return finish()


def _asked(order: ExportOrder) -> dict[str, Any]:
    """Return the options that were given, as the bundle tells them."""
    given = {"precision": order.precision, "vae_precision": order.vae_precision, "batch": order.batch}
    asked: dict[str, Any] = {k: v for k, v in {**given, "opset": order.opset}.items() if v is not None}
    if order.size is not None:
        asked |= {"height": order.size[1], "width": order.size[0]}
    if order.steps is not None:
        asked["steps"] = sorted(set(order.steps))
    if order.vae is not None:
        asked["vae"] = _name(Path(order.vae)) if Path(order.vae).is_dir() else order.vae
    return asked


def _is_bundle(path: str | Path) -> bool:
    return Path(path, "bundle.json").is_file()


def _default_output(source: str) -> Path:
    if _is_bundle(source):
        return Path(source)
    name = (
        Path(source).resolve().name
        if Path(source).is_dir()
        else source.rstrip("/").replace(":", "/").rpartition("/")[2]
    )
    return Path(name + ".bundle")


def _request(
    source: str, asked: dict[str, Any], revision: str | None, variant: str | None, vae: str | None
) -> dict[str, Any]:
    """What the bundle will say that it was asked for; of a bundle as source, only what was asked explicitly.

    Of a local folder it keeps the name and a digest of its files' names, sizes and times: a bundle that is given
    away need not tell where it was built, and a changed source is noticed.
    """
    if _is_bundle(source):
        given = {"revision": revision, "variant": variant, **asked}
        return {k: v for k, v in given.items() if v is not None}
    folder = _own_checkpoint() if source == DEMO else Path(source)
    stamps = [_stamp(f) for f in (folder, Path(vae or "")) if f.is_dir() and f != Path()]
    stamp = hashlib.sha256("\n".join(stamps).encode(errors="surrogateescape")).hexdigest() if stamps else None
    source = _name(folder) if folder.is_dir() else source
    shape = {"height": 512, "width": 512, "batch": 1, "steps": [1, 2, 3, 4], "opset": 21, **asked}
    return {"source": source, "revision": revision, "variant": variant, "stamp": stamp, **shape}


def _name(folder: Path) -> str:
    return folder.resolve().name


def _stamp(folder: Path) -> str:
    """A line for each file: its name, size and time."""
    seen = sorted((str(p.relative_to(folder)), p.stat()) for p in folder.rglob("*") if p.is_file())
    return "\n".join(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in seen)


def _own_checkpoint() -> Path:
    """The folder of the source "demo", found without an import of turbochain.export, which has it."""
    spec = importlib.util.find_spec("turbochain.export")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / DEMO


@contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[int]:
    def say() -> None:
        if not quiet:
            print(f"waiting: another build of {path} is running", file=sys.stderr)

    with lock_directory(path, on_wait=say) as lock:
        yield lock


def _check_same(bundle: Bundle, source: str, request: dict[str, Any]) -> None:
    """InputError where an existing bundle is not what is asked for."""
    have = bundle.manifest.request
    other = [f"{k} is {have.get(k)!r} there and {v!r} here" for k, v in request.items() if have.get(k) != v]
    other = [o if not o.startswith("stamp is") else f"the files of {source} have changed" for o in other]
    if _is_bundle(source) and Bundle.open(source).manifest.files != bundle.manifest.files:
        other = [f"its files are not those of {source}"]
    if other:
        raise InputError(f"{bundle.path} holds another build ({'; '.join(other)}): choose another path with -o")
