"""`build`: a source → a bundle with an engine for this machine, checked against diffusers.

A bundle is made in `NAME.bundle.partial/` and renamed when whole; an engine in `engines/.building/` and renamed
when verified. Both folders are locked while in use. What is finished is written down with its hashes, so an
interrupted build goes on where it stopped.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.engines import worker
from turbochain.engines.progress import Phase
from turbochain.runtime import backends, engine, files, manifest, verify
from turbochain.runtime.bundle import REFERENCE, TEXT_TO_IMAGE, Bundle
from turbochain.runtime.errors import BundleError, InputError
from turbochain.runtime.manifest import FORMAT_VERSION, Check, Checkpoint, Engine, EngineKey, Graph, Manifest

VERSIONS = ("turbochain", "torch", "diffusers", "transformers", "onnx", "onnxscript", "numpy", "tokenizers")
_STATE = "state.json"
_LOG = "build.log"
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class PhaseReport:
    """What one phase of this build took."""

    name: str
    seconds: float
    peak_bytes: int  # resident memory of its process


@dataclass
class BuildResult:
    """What a build did."""

    bundle: Path
    engine: str  # the folder's name in engines/
    precision: dict[str, str]  # graph → precision
    engine_bytes: dict[str, int]  # graph → bytes that the engine reads
    build_seconds: dict[str, float]  # graph → compilation
    checks: list[Check]
    phases: list[PhaseReport] = field(default_factory=list)  # empty where there was nothing to do
    backend: str = ""
    reason: str = ""  # why this backend


@dataclass
class Session:
    """What every phase of one build needs."""

    lock: int
    log: Path | None
    quiet: bool
    phases: list[PhaseReport]

    def run(self, name: str, job: str, /, **arguments: Any) -> Any:
        """Run a job in a process of its own, with a progress bar; see `worker.run`."""
        with Phase(name, quiet=self.quiet) as phase:
            result, peak = worker.run(job, arguments, progress=phase, lock=self.lock, log=self.log)
        self.phases.append(PhaseReport(name, phase.seconds, peak))
        return result


def build(
    source: str,
    output: str | Path | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    steps: list[int] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    force: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> BuildResult:
    """Build `output` (default: the source's name + ".bundle", here) with an engine for this machine.

    `source`: a hub id, a local folder in diffusers' format, "synthetic:NAME", or a bundle. `backend`: default
    the best installed one. `precision`: "fp32" or "fp16" (default: the backend's). `size`: width and height in
    pixels, multiples of 64 (default 512×512). `steps`: step counts (default 1 to 4). `force` skips the check
    of memory and disk. A second call with the same arguments finds the result and does nothing. Raises
    InputError for what cannot be built, VerificationError where the engine differs from diffusers by more
    than its bounds (the engine is then not installed).
    """
    backend, reason = _choose(backend)
    device = backends.get(backend).device(device)
    asked = _asked(precision, size, batch, steps)
    output = Path(output) if output is not None else _default_output(source)
    phases: list[PhaseReport] = []
    if _is_bundle(source) or _is_bundle(output):
        request = asked
    else:
        defaults = {"precision": backends.get(backend).PRECISION, "height": 512, "width": 512, "batch": 1}
        request = {**defaults, "steps": [1, 2, 3, 4], **asked}
    request = {"source": source, "revision": revision, "variant": variant, "stamp": _stamp(source), **request}
    if not _is_bundle(output):
        if output.exists():
            raise InputError(f"{output} exists and is not a bundle: choose another path with -o")
        partial = output.with_name(output.name + ".partial")
        with _locked(partial, quiet) as lock:
            if _is_bundle(output):  # the owner of the lock that we waited for made it
                partial.rmdir()
            else:
                session = Session(lock, None if verbose else partial / _LOG, quiet, phases)
                _export(session, request, partial, output, force, device)
    with _locked(output, quiet) as lock:
        bundle = Bundle.open(output)
        _check_same(bundle, source, request)
        session = Session(lock, None if verbose else output / "engines" / _LOG, quiet, phases)
        name, made = _engine(session, bundle, backend, device)
    return BuildResult(
        bundle=output,
        engine=name,
        precision={g: bundle.manifest.graphs[g].precision for g in bundle.chain.graphs},
        engine_bytes=made.bytes,
        build_seconds=made.build_seconds,
        checks=list(made.checks),
        phases=phases,
        backend=backend,
        reason=reason,
    )


def _choose(backend: str | None) -> tuple[str, str]:
    if backend is None:
        return backends.best()
    backends.get(backend)
    backends.require(backend)
    return backend, "as asked"


def _asked(
    precision: str | None, size: tuple[int, int] | None, batch: int | None, steps: list[int] | None
) -> dict[str, Any]:
    """The options that were given, checked; InputError for the first that cannot be."""
    asked: dict[str, Any] = {}
    if precision is not None:
        if precision not in ("fp32", "fp16"):
            raise InputError(f"precision {precision!r}: choose fp32 or fp16")
        asked["precision"] = precision
    if size is not None:
        width, height = size
        if min(size) < 64 or width % 64 or height % 64:
            raise InputError(f"size {width}x{height}: width and height must be multiples of 64 pixels")
        asked |= {"height": height, "width": width}
    if batch is not None:
        if batch < 1:
            raise InputError(f"batch {batch}: at least 1 was expected")
        asked["batch"] = batch
    if steps is not None:
        if not steps or min(steps) < 1 or max(steps) > 50:
            raise InputError(f"steps {steps}: counts from 1 to 50 were expected, such as 1-4 or 1,2,4")
        asked["steps"] = sorted(set(steps))
    return asked


def _is_bundle(path: str | Path) -> bool:
    return Path(path, "bundle.json").is_file()


def _default_output(source: str) -> Path:
    if _is_bundle(source):
        return Path(source)
    return Path(source.rstrip("/").replace(":", "/").rpartition("/")[2] + ".bundle")


def _stamp(source: str) -> str | None:
    """A digest of a local folder's file names, sizes and times, so that a changed source is noticed."""
    folder = Path(source)
    if not folder.is_dir() or _is_bundle(source):
        return None
    seen = sorted((str(p.relative_to(folder)), p.stat()) for p in folder.rglob("*") if p.is_file())
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in seen]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


@contextmanager
def _locked(path: Path, quiet: bool) -> Iterator[int]:
    def say() -> None:
        if not quiet:
            print(f"waiting: another build of {path} is running", file=sys.stderr)

    with files.lock_directory(path, on_wait=say) as lock:
        yield lock


def _check_same(bundle: Bundle, source: str, request: dict[str, Any]) -> None:
    """InputError where an existing bundle is not what is asked for."""
    if _is_bundle(source) and Path(source).resolve() != bundle.path.resolve():
        raise InputError(f"{bundle.path} exists already; to add an engine to {source} leave out -o")
    have = bundle.manifest.request
    wanted = {k: v for k, v in request.items() if not (_is_bundle(source) and k in ("source", "stamp"))}
    wanted = {k: v for k, v in wanted.items() if v is not None or not _is_bundle(source)}
    other = [f"{k} is {have.get(k)!r} there and {v!r} here" for k, v in wanted.items() if have.get(k) != v]
    if other:
        raise InputError(f"{bundle.path} holds another build ({'; '.join(other)}): choose another path with -o")


# --- checkpoint → bundle -----------------------------------------------------------------------------------


class _State:
    """`state.json` in the partial folder: what was asked, and what of it is done and with which files."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self._folder = folder
        self.value: dict[str, Any] = {"request": request, "done": {}}
        try:
            old = json.loads((folder / _STATE).read_text())
        except (OSError, ValueError):
            old = None
        if old and old.get("request") == request:
            self.value = old
        else:
            _empty(folder)

    def once(self, key: str, make: Callable[[], Any], made: Callable[[Any], list[str]]) -> Any:
        """The result of `make`, unless an earlier build did it and its files (`made`) are still as they were."""
        done = self.value["done"].get(key)
        if done and self._intact(done["files"]):
            return done["result"]
        result = make()
        records = {name: dataclasses.asdict(files.describe(self._folder / name)) for name in made(result)}
        self.value["done"][key] = {"result": result, "files": records}
        files.write_atomically(self._folder / _STATE, json.dumps(self.value))
        return result

    def _intact(self, records: dict[str, Any]) -> bool:
        try:
            files.check_all(self._folder, {n: files.FileRecord(**r) for n, r in records.items()}, full=False)
        except BundleError:
            return False
        return True

    def records(self) -> dict[str, files.FileRecord]:
        """Every file that was made, with its hash."""
        done = self.value["done"].values()
        return {name: files.FileRecord(**r) for entry in done for name, r in sorted(entry["files"].items())}


def _export(
    session: Session, request: dict[str, Any], partial: Path, output: Path, force: bool, device: str
) -> None:
    _require_export()
    state = _State(partial, request)
    common = {"request": request, "folder": str(partial)}
    prepared = state.once(
        "prepare",
        lambda: session.run("load", "turbochain.export.jobs:prepare", force=force, device=device, **common),
        lambda result: [*result["terms"], *(t["file"] for t in result["tokenizers"].values())],
    )
    common["prepared"] = prepared
    state.once(
        "reference",
        lambda: session.run("reference", "turbochain.export.jobs:reference", **common),
        lambda _: [REFERENCE],
    )
    graphs = {
        name: state.once(
            f"graph {name}",
            lambda name=name: session.run(f"export {name}", "turbochain.export.jobs:graph", name=name, **common),
            lambda graph: [graph["file"], *graph["data"], graph["names"]],
        )
        for name in prepared["precisions"]
    }
    text = manifest.write(_manifest(request, prepared, graphs, state.records()))
    keep = {*state.records(), "bundle.json"}
    files.write_atomically(partial / "bundle.json", text)
    Bundle.open(partial)
    _empty(partial, keep)
    files.install_directory(partial, output)


def _require_export() -> None:
    missing = []
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(f"exporting a checkpoint needs {', '.join(missing)}: pip install 'turbochain[export]'")


def _manifest(
    request: dict[str, Any], prepared: dict[str, Any], graphs: dict[str, Any], records: dict[str, files.FileRecord]
) -> Manifest:
    checkpoint = Checkpoint(
        source=request["source"],
        revision=prepared["commit"],
        variant=prepared["variant"],
        pipeline_class=prepared["pipeline_class"],
        license=prepared["license"],
        weights={k: files.FileRecord(**v) for k, v in prepared["weights"].items()},
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        family=prepared["family"],
        checkpoint=checkpoint,
        request=request,
        created=_now(),
        created_by=_versions(*VERSIONS),
        tokenizers={k: manifest.TokenizerFile(**v) for k, v in prepared["tokenizers"].items()},
        graphs={k: Graph(**v) for k, v in graphs.items()},
        chains={TEXT_TO_IMAGE: manifest.Chain(**prepared["chain"])},
        schedules=prepared["schedules"],
        files=records,
    )


def _empty(folder: Path, keep: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Remove everything in `folder` but the files named in `keep`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in keep:
            path.unlink()


# --- bundle → engine ---------------------------------------------------------------------------------------


def _engine(session: Session, bundle: Bundle, backend: str, device: str) -> tuple[str, Engine]:
    """The installed engine of this key, built and verified if there is none."""
    library, version = backends.require(backend)
    key = EngineKey(backend, device, library, version, options={}, graphs=bundle.graph_digests())
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(key), sort_keys=True).encode()).hexdigest()
    name = f"{backend}-{device}-{digest[:12]}"
    existing = bundle.engines().get(name)
    if isinstance(existing, Engine) and engine.misfit(bundle, existing) is None:
        engine.check_inputs(bundle)
        return name, existing
    final, building = bundle.path / "engines" / name, bundle.path / "engines" / ".building"
    for old in (building, final):  # left by a build that was killed, or damaged
        shutil.rmtree(old, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        made = _compile_and_check(session, bundle, key, building)
        files.write_atomically(building / "engine.json", manifest.write(made))
        files.install_directory(building, final)
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        (bundle.path / "engines" / _LOG).unlink(missing_ok=True)
    return name, made


def _compile_and_check(session: Session, bundle: Bundle, key: EngineKey, folder: Path) -> Engine:
    common = {
        "path": str(bundle.path),
        "backend": key.backend,
        "folder": str(folder),
        "options": key.options,
        "device": key.device,
    }
    seconds, peaks = {}, {}
    for name in key.graphs:
        session.run(f"compile {name}", "turbochain.engines.jobs:compile", name=name, **common)
        seconds[name], peaks[f"compile {name}"] = session.phases[-1].seconds, session.phases[-1].peak_bytes
    checks = [Check(**c) for c in session.run("verify", "turbochain.engines.jobs:check", **common)]
    peaks["verify"] = session.phases[-1].peak_bytes
    verify.require(checks)
    written = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    graphs = bundle.manifest.graphs
    return Engine(
        format_version=FORMAT_VERSION,
        key=key,
        files={str(p.relative_to(folder)): files.describe(p) for p in written},
        bytes={g: sum(bundle.manifest.files[f].size for f in graphs[g].files) for g in key.graphs},
        build_seconds=seconds,
        peak_bytes=peaks,
        checks=tuple(checks),
        created=_now(),
        created_by=_versions("turbochain", key.library, "numpy"),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
