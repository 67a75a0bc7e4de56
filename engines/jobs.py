"""The engine's build as jobs, each run in a process of its own; arguments and results are plain JSON values."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbochain.engines import compiling
from turbochain.runtime import backends, selection
from turbochain.runtime.bundle.manifest import REFERENCE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import verify

Progress = Callable[[int, int], None]


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

    With `READS_GRAPHS` a backend's engine reads the bundle's graphs: it is tried whether it takes this one.
    """
    bundle = Bundle.open(path)
    bundle.check_files(bundle.manifest.graphs[name].files)
    module = importlib.import_module(f"turbochain.engines.backends.{backend}")
    written: list[str] = []
    if hasattr(module, "compile"):
        where = compiling.device(backend, device, target)
        written = list(module.compile(bundle, name, Path(folder), options, where, Path(cache), progress))
    if module.READS_GRAPHS:
        selection.executor(bundle, backend, Path(folder), options, device=device, threads=None, graphs=[name]).close()
    return written


def check(
    progress: Progress, *, path: str, backend: str, folder: str, options: dict[str, Any], device: str | None
) -> list[dict[str, Any]]:
    """Verify the engine in `folder`; returns the checks, passed or not."""
    bundle = Bundle.open(path)
    bundle.check_files([REFERENCE])
    selection.check_inputs(bundle)
    executor = selection.executor(bundle, backend, Path(folder), options, device=device, threads=None)
    computed = backends.precisions(backend, options, bundle.manifest.graphs)
    try:
        return [dataclasses.asdict(c) for c in verify.verify(bundle, executor, computed, progress)]
    finally:
        executor.close()
