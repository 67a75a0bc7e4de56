"""Bundle → engine: compiled in `engines/.building/`, and renamed when verified."""

import dataclasses
import hashlib
import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from turbochain.engines.resume import Finished, empty
from turbochain.engines.session import Session, now, versions
from turbochain.runtime import backends, engine, files, manifest, verify
from turbochain.runtime.bundle import Bundle
from turbochain.runtime.errors import BundleError, InputError, VerificationError
from turbochain.runtime.manifest import FORMAT_VERSION, Check, Engine, EngineKey


def install(session: Session, bundle: Bundle, backend: str, device: str) -> tuple[str, Engine]:
    """The engine of this backend and machine in a locked bundle, built and verified if there is none."""
    library, version = backends.require(backend)
    options = importlib.import_module(f"turbochain.engines.{backend}").OPTIONS
    key = EngineKey(backend, device, library, version, options, graphs=bundle.graph_digests())
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(key), sort_keys=True).encode()).hexdigest()
    name = f"{backend}-{device}-{digest[:12]}"
    final, building = bundle.path / "engines" / name, bundle.path / "engines" / ".building"
    engine.check_inputs(bundle)
    if existing := _intact(bundle, name):
        return name, existing
    try:
        building.mkdir(parents=True, exist_ok=True)
        made = _compile_and_check(session, bundle, key, building)
        files.write_atomically(building / "engine.json", manifest.write(made))
        empty(building, keep=(*made.files, "engine.json"))
        if final.exists():  # damaged
            empty(final)
            final.rmdir()
        files.install_directory(building, final)
    except VerificationError:
        empty(building)
        building.rmdir()
        if session.log:
            session.log.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror}") from error
    if session.log:
        session.log.unlink(missing_ok=True)
    return name, made


def _intact(bundle: Bundle, name: str) -> Engine | None:
    """The installed engine of this name, unless it is missing or damaged."""
    existing = bundle.engines().get(name)
    if not isinstance(existing, Engine) or engine.misfit(bundle, existing) is not None:
        return None
    try:
        files.check_all(bundle.path / "engines" / name, existing.files, full=False)
    except BundleError:
        return None
    return existing


def _compile_and_check(session: Session, bundle: Bundle, key: EngineKey, folder: Path) -> Engine:
    common = {
        "path": str(bundle.path),
        "backend": key.backend,
        "folder": str(folder),
        "options": key.options,
        "device": key.device,
    }
    state = Finished(folder, dataclasses.asdict(key))
    done = {
        name: state.once(f"compile {name}", partial(_compile, session, name, common), lambda result: result["files"])
        for name in key.graphs
    }
    written = state.records()
    checks = [Check(**c) for c in session.run("verify", "turbochain.engines.jobs:check", **common)]
    verify.require(checks)
    sizes = {**bundle.manifest.files, **written}
    graphs = bundle.manifest.graphs
    return Engine(
        format_version=FORMAT_VERSION,
        key=key,
        files=written,
        bytes={g: sum(sizes[f].size for f in done[g]["files"] or graphs[g].files) for g in key.graphs},
        build_seconds={g: done[g]["seconds"] for g in key.graphs},
        peak_bytes={**{g: done[g]["peak_bytes"] for g in key.graphs}, "verify": session.phases[-1].peak_bytes},
        checks=tuple(checks),
        created=now(),
        created_by=versions("turbochain", key.library, "numpy"),
    )


def _compile(session: Session, name: str, common: dict[str, Any]) -> dict[str, Any]:
    written = session.run(f"compile {name}", "turbochain.engines.jobs:compile", name=name, **common)
    report = session.phases[-1]
    return {"files": written, "seconds": report.seconds, "peak_bytes": report.peak_bytes}
