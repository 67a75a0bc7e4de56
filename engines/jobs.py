"""The child half of an engine's build: jobs, each in a process of its own, with plain JSON values."""

import dataclasses
from pathlib import Path
from typing import Any

from turbochain.engines import backends as builders
from turbochain.engines import installed
from turbochain.engines.backends.contract import Compilation, Progress
from turbochain.runtime import backends
from turbochain.runtime.backends.contract import Opened
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

    A graph that engines of the backend read is then loaded once, which shows whether the backend takes it.
    """
    bundle, builder = Bundle.open(path), builders.get(backend)
    bundle.check_files(bundle.manifest.graphs[name].files)
    where = installed.device(backend, device, target)
    written = builder.compile(Compilation(bundle, name, Path(folder), options, where, Path(cache), progress))
    if builder.reads_graphs:
        executor = backends.get(backend).executor(Opened(bundle, Path(folder), options, where))
        try:
            executor.load([name])
        finally:
            executor.close()
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
) -> list[dict[str, Any]]:
    """Verify one chain of the engine in `folder`; returns the checks, passed or not."""
    bundle = Bundle.open(path)
    opened = bundle.open_chain(chain)
    bundle.check_files([REFERENCE, *opened.files])
    where = backends.get(backend).device(device)
    executor = backends.get(backend).executor(Opened(bundle, Path(folder), options, where))
    try:
        computed = backends.precisions(backend, options, opened.graphs)
        return [dataclasses.asdict(c) for c in verify.verify(opened, executor, computed, progress)]
    finally:
        executor.close()
