"""Which engine of a bundle fits this machine, and opening it."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime import backends
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Engine, EngineKey
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.plan import stage_plan
from turbochain.runtime.errors import BundleError, InputError


def misfit(bundle: Bundle, engine: Engine, device: str | None = None) -> str | None:
    """Why an engine does not fit this machine and this bundle, as a phrase; None where it fits."""
    key = engine.key
    if key.backend not in backends.names():
        return f"it is for the backend {key.backend}, which this version does not have"
    module, library = backends.get(key.backend), backends.library(key.backend)
    if library is None:
        return f"its backend {key.backend} is not installed: {module.INSTALL}"
    try:
        reason = module.misfit(dataclasses.replace(key, options=engine.options), library, module.device(device))
    except InputError as error:  # no such device here
        return str(error)
    if reason is None and any(key.graphs.get(g) != bundle.graph_digest(g) for g in bundle.chain.graphs):
        reason = "it was built from other graphs"
    return reason


def rebuild(bundle: Bundle, engine: Engine, device: str | None = None) -> str:
    """The command that builds such an engine for this machine."""
    options = "".join(f" -O {name}={value}" for name, value in engine.ordered.items())
    return _command(bundle, engine.key.backend, device) + options


def _command(bundle: Bundle, backend: str | None, device: str | None) -> str:
    given = (("--backend", backend), ("--device", device))
    chosen = "".join(f" {option} {shlex.quote(value)}" for option, value in given if value is not None)
    return f"build-engine {shlex.quote(str(bundle.path))}{chosen}"


def has_device(backend: str) -> bool:
    """Whether this machine has a device that the backend runs on."""
    try:
        backends.get(backend).device(None)
    except InputError:
        return False
    return True


def select(
    bundle: Bundle, backend: str | None = None, device: str | None = None, engine: str | None = None
) -> tuple[str, Engine]:
    """The folder name and manifest of the best engine that fits, of several such the one that was built last.

    `engine`: only the one of this folder name. BundleError says why none does.
    """
    if backend is not None:
        backends.require(backend)
        backends.get(backend).device(device)  # where there is none, that is what helps
    reasons, fitting = [], []
    found = bundle.engines()
    if engine not in (None, *found):
        raise InputError(f"{bundle.path} has no engine {engine!r}: choose from {', '.join(found) or 'none'}")
    for name, made in found.items():
        if engine not in (None, name):
            continue
        if isinstance(made, BundleError):
            reasons.append(str(made))
        elif backend not in (None, made.key.backend):
            reasons.append(f"{name}: it is for the backend {made.key.backend}")
        elif reason := misfit(bundle, made, device):
            reasons.append(f"{name}: {reason}")
        else:
            fitting.append((name, made))
    if fitting:
        return max(fitting, key=lambda item: (_rank(item[1].key), item[1].created))
    if backend is None:
        backends.best(device)  # with no backend at all, its `pip install` line is what helps
    why = "; ".join(reasons) or "it has none"
    raise BundleError(
        f"{bundle.path} has no engine for this machine ({why}); build one: {_command(bundle, backend, device)}"
    )


def _rank(key: EngineKey) -> int:
    rank: int = backends.get(key.backend).PREFERENCES[key.device].rank
    return rank


def open_executor(
    bundle: Bundle,
    name: str,
    engine: Engine,
    *,
    device: str | None = None,
    threads: int | None = None,
    profile: bool = False,
) -> Any:
    """Hash everything that the engine reads, then load it. Its own files are code, so they are always hashed."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads!r}: a whole number of at least 1 was expected")
    folder = bundle.path / "engines" / name
    hashing.check_all(folder, engine.files, full=True)
    check_inputs(bundle)
    key = engine.key
    return executor(bundle, key.backend, folder, engine.options, device=device, threads=threads, profile=profile)


def check_inputs(bundle: Bundle) -> None:
    """Hash what the text-to-image chain reads."""
    graphs = [f for g in bundle.chain.graphs for f in bundle.manifest.graphs[g].files]
    bundle.check_files([*graphs, *(t.file for t in bundle.manifest.tokenizers.values())])


def executor(
    bundle: Bundle,
    backend: str,
    folder: Path,
    options: dict[str, Any],
    *,
    device: str | None,
    threads: int | None,
    graphs: Sequence[str] | None = None,
    profile: bool = False,
) -> Any:
    """The backend's executor for an engine's folder, whose files have been hashed.

    `graphs`: only these, or all. `profile`: its `operators` will be asked for, which a GPU's executor does not have.
    """
    module = backends.get(backend)
    where = {"device": module.device(device), "threads": threads, "graphs": graphs}
    return module.executor(bundle, folder, options, **where, **({"profile": True} if profile else {}))


def feeds(bundle: Bundle, executor: Any, steps: int) -> dict[str, np.ndarray]:
    """What the chain reads as `Constant(name, row)`: name → [steps, *shape].

    The schedule's columns, and what the chain's `once` graphs, which the executor must hold, make of each row.
    """
    columns = bundle.columns(steps)
    made = dict(columns)
    for graph in bundle.chain.once:
        tensors = bundle.manifest.graphs[graph]
        plan = stage_plan(graph, tensors)
        rows: list[dict[str, np.ndarray]] = []
        for row in range(steps):
            results = executor.execute(plan, {t.name: columns[t.name][row] for t in tensors.inputs})
            rows.append({name: value.copy() for name, value in results.items()})
        made |= {t.name: np.stack([row[t.name] for row in rows]) for t in tensors.outputs}
    return made
