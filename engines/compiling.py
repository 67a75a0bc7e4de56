"""Bundle → engine: compiled in `engines/.building/`, and renamed when verified."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from turbochain.engines import options
from turbochain.engines.order import EngineOrder
from turbochain.export.phases.phases import SMALL, Phases, now, versions
from turbochain.export.phases.resume import Finished, empty, leave_nothing
from turbochain.runtime import backends, selection
from turbochain.runtime.backends import Device
from turbochain.runtime.bundle import hashing, strict_json, writing
from turbochain.runtime.bundle.manifest import FORMAT_VERSION, Check, Engine, EngineKey
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import verify
from turbochain.runtime.errors import BundleError, InputError, NoSpace, PhaseDied, TurbochainError, VerificationError


def device(backend: str, name: str | None, target: str | None) -> Device:
    """The device that an engine is for; InputError where there is none such or the backend cannot build for it."""
    module = backends.get(backend)
    if target is None:
        return module.device(name)
    if not hasattr(module, "target"):
        raise InputError(f"target {target!r}: the backend {backend} builds only for the machine that it runs on")
    return module.target(target)


def install(phases: Phases, bundle: Bundle, order: EngineOrder) -> tuple[str, Engine]:
    """The engine that was ordered in a locked bundle, built and verified if there is none.

    One for another machine cannot be verified here: it has no checks until it is loaded there. A build that fails or
    is cancelled leaves nothing behind; one that is killed, or finds the disk full, what was finished.
    """
    name, key = _key(bundle, order)
    final, building = bundle.path / "engines" / name, bundle.path / "engines" / ".building"
    selection.check_inputs(bundle)
    if existing := _intact(bundle, name, key):
        return name, existing
    try:
        building.mkdir(parents=True, exist_ok=True)
        made = _compile_and_check(phases, bundle, key, order, building)
        writing.write_atomically(building / "engine.json", strict_json.write(made))
        empty(building, keep=(*made.files, "engine.json"))
        if final.exists():  # damaged
            empty(final)
            final.rmdir()
        writing.install_directory(building, final)
    except (NoSpace, PhaseDied):
        raise
    except (TurbochainError, KeyboardInterrupt):
        _drop_log(phases)
        with suppress(OSError):  # other engines are there
            leave_nothing(building)
            building.parent.rmdir()
        raise
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror}") from error
    finally:
        phases.release()
    _drop_log(phases)
    return name, made


def _key(bundle: Bundle, order: EngineOrder) -> tuple[str, EngineKey]:
    """What the engine that was ordered depends on, and the name of its folder."""
    where = device(order.backend, order.device, order.target)
    library, version = backends.require(order.backend)
    chosen = options.settled(order.backend, options.resolve(order.backend, order.options))
    key = EngineKey(order.backend, where.kind, library, version, chosen, bundle.graph_digests(), where.gpu)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(key), sort_keys=True).encode()).hexdigest()
    short = f"sm{where.gpu.compute_capability.replace('.', '')}" if where.gpu else where.kind
    return f"{order.backend}-{short}-{digest[:12]}", key


def _drop_log(phases: Phases) -> None:
    if phases.log:
        phases.log.unlink(missing_ok=True)


def _intact(bundle: Bundle, name: str, key: EngineKey) -> Engine | None:
    """The installed engine of this name and key, unless it is missing or damaged."""
    existing = bundle.engines().get(name)
    if not isinstance(existing, Engine) or existing.key != key:
        return None
    try:
        hashing.check_all(bundle.path / "engines" / name, existing.files, full=False)
    except BundleError:
        return None
    return existing


def _compile_and_check(phases: Phases, bundle: Bundle, key: EngineKey, order: EngineOrder, folder: Path) -> Engine:
    common = {
        "path": str(bundle.path),
        "backend": key.backend,
        "folder": str(folder),
        "device": order.device,
    }
    candidates = options.candidates(key.backend, key.options)
    first = {**key.options, **candidates[0]}
    compiler = {**common, "options": first, "target": order.target, "cache": str(order.cache or bundle.path.parent)}
    run = partial(phases.run, keep=bundle.weight_bytes() <= SMALL)
    state = Finished(folder, dataclasses.asdict(key))

    def compile(name: str) -> dict[str, Any]:
        written = run(f"compile {name}", "turbochain.engines.jobs:compile", name=name, **compiler)
        report = phases.reports[-1]
        return {"files": written, "seconds": report.seconds, "peak_bytes": report.peak_bytes}

    done = {
        name: state.once(f"compile {name}", partial(compile, name), lambda result: result["files"])
        for name in key.graphs
    }
    written = state.records()
    settled = candidates[0]
    checks: list[Check] = []
    if order.target is None:
        check = partial(run, "verify", "turbochain.engines.jobs:check", **common)
        settled, checks = _first_within_bounds(phases, candidates, lambda c: check(options={**key.options, **c}))
    sizes = {**bundle.manifest.files, **written}
    read = bundle.manifest.graphs if options.reads_graphs(key.backend) else {}
    return Engine(
        format_version=FORMAT_VERSION,
        key=key,
        files=written,
        bytes={
            g: sum(sizes[f].size for f in (*done[g]["files"], *(read[g].files if read else ()))) for g in key.graphs
        },
        build_seconds={g: done[g]["seconds"] for g in key.graphs},
        peak_bytes={
            **{g: done[g]["peak_bytes"] for g in key.graphs},
            **({"verify": phases.reports[-1].peak_bytes} if checks else {}),
        },
        checks=tuple(checks),
        ordered=options.changed(key.backend, options.resolve(key.backend, order.options)),
        created=now(),
        created_by=versions("turbochain", key.library, "numpy"),
        settled=settled,
    )


def _first_within_bounds(
    phases: Phases, candidates: list[dict[str, Any]], check: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> tuple[dict[str, Any], list[Check]]:
    """The first of the candidates that passes and its checks; raises VerificationError where the last one fails."""
    for candidate, other in zip(candidates, [*candidates[1:], None], strict=True):
        checks = [Check(**c) for c in check(candidate)]
        try:
            verify.require(checks)
            break
        except VerificationError as error:
            if other is None:
                raise
            if not phases.quiet:
                print(f"{_text(candidate)}: {error}; next: {_text(other)}", file=sys.stderr)
    return candidate, checks


def _text(settled: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settled.items())
