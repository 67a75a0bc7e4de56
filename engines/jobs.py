"""The child half of an engine's build: jobs, in processes of their own, with plain JSON values.

What one job has loaded stays for the next one of the same process and engine.
"""

import dataclasses
from pathlib import Path
from typing import Any

from turbochain.engines import backends as builders
from turbochain.engines import installed
from turbochain.engines.backends.contract import Compilation, Progress
from turbochain.runtime import backends
from turbochain.runtime.backends.contract import Device, Executor, Opened
from turbochain.runtime.bundle.manifest import REFERENCE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import verify


def compile(
    progress: Progress,
    *,
    path: str,
    backend: str,
    folder: str,
    options: dict[str, Any],
    device: str | None,
    target: str | None,
    cache: str,
    name: str,
) -> list[str]:
    """Compile one graph of the bundle into `folder`; returns the names of the files that it wrote there.

    If the backend's engines read the bundle's graph itself, it is loaded once, which shows whether the backend takes
    it.
    """
    bundle, builder = Bundle.open(path), builders.get(backend)
    bundle.check_files(bundle.manifest.graphs[name].files)
    where = installed.device(backend, device, target)
    written = builder.compile(Compilation(bundle, name, Path(folder), options, where, Path(cache), progress))
    if builder.reads_graphs:
        _executor(bundle, backend, folder, options, where).load([name])
    return written


def check(
    progress: Progress,
    *,
    path: str,
    backend: str,
    folder: str,
    options: dict[str, Any],
    device: str | None,
    chain: str,
    whole: bool,
) -> list[dict[str, Any]]:
    """Verify one chain of the engine in `folder`; returns the checks, passed or not: see `verify`."""
    bundle = Bundle.open(path)
    opened = bundle.open_chain(chain)
    bundle.check_files([REFERENCE, *opened.files])
    where = backends.get(backend).device(device)
    executor = _executor(bundle, backend, folder, options, where)
    computed = backends.precisions(backend, options, opened.graphs)
    return [dataclasses.asdict(c) for c in verify.verify(opened, executor, computed, progress, whole=whole)]


_kept: list[tuple[object, Executor]] = []
"""What the last job's executor was made for, and the executor."""


def _executor(bundle: Bundle, backend: str, folder: str, options: dict[str, Any], device: Device) -> Executor:
    """Return the last job's executor if it is of the same engine, else another."""
    engine = (bundle.path, backend, folder, options, device)
    if not _kept or _kept[0][0] != engine:
        close()
        _kept.append((engine, backends.get(backend).executor(Opened(bundle, Path(folder), options, device))))
    return _kept[0][1]


def close() -> None:
    """Give back what the last job has loaded."""
    while _kept:
        _kept.pop()[1].close()
