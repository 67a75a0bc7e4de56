"""The order of a build: a bundle and an engine. Checked in one place for the command line and for Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbochain.engines import backends as builders
from turbochain.engines import options as backend_options
from turbochain.export.order import ExportOrder, How
from turbochain.runtime import backends
from turbochain.runtime.errors import InputError


@dataclass(frozen=True)
class EngineOrder:
    """An engine to build."""

    backend: str
    device: str | None = None  # of this machine; None: the default one
    target: str | None = None  # an architecture such as "sm89", to build for another machine
    options: Mapping[str, Any] = field(default_factory=dict)  # of the backend; those that are missing are its defaults
    cache: Path | None = None  # folder for TensorRT's timings; None: beside the bundle, or beside `engines`
    reason: str = "as asked"  # why this backend, for people
    chains: tuple[str, ...] | None = None  # whose graphs are compiled and verified; None: all of the bundle's
    engines: Path | None = None  # folder that engines are kept in; None: the bundle's, or the user's cache


@dataclass(frozen=True)
class BuildOrder:
    """A bundle and an engine to build, and how."""

    export: ExportOrder
    engine: EngineOrder
    how: How


def engine_order(
    backend: str | None,
    device: str | None,
    target: str | None,
    options: Mapping[str, object] | None,
    timing_cache: str | Path | None,
    precision: str | None,
    chains: Sequence[str] | None = None,
    engines: str | Path | None = None,
) -> EngineOrder:
    """Return the order of an engine, with the best backend for this machine if `backend` is None.

    The other arguments are those of `build`. InputError if the backend, an option or a path cannot be.
    """
    chosen, reason = _choose(backend, device, target)
    given: Mapping[str, object] = dict(options or {})
    if precision is not None:
        given = {**builders.get(chosen).of_precision(precision), **given}
    cache = None if timing_cache is None else Path(timing_cache)
    if cache and cache.exists() and not cache.is_dir():
        raise InputError(f"timing cache {cache}: a folder was expected, with one file per GPU and library version")
    if isinstance(chains, str) or (chains is not None and not chains):
        raise InputError(f"chains {chains!r}: a list of names was expected, such as ['text-to-image']")
    kept = None if engines is None else Path(engines)
    if kept and kept.exists() and not kept.is_dir():
        raise InputError(f"engines {kept}: a folder was expected, in which engines are kept")
    named = None if chains is None else tuple(chains)
    return EngineOrder(chosen, device, target, backend_options.resolve(chosen, given), cache, reason, named, kept)


def _choose(backend: str | None, device: str | None, target: str | None) -> tuple[str, str]:
    """Return a backend and the reason for it."""
    if backend is None:
        if target is not None:
            able = next(name for name, known in backends.known().items() if known.target)
            return able, f"it builds for {target} without such a GPU"
        return backends.best(device)
    backends.get(backend)
    backends.require(backend)
    return backend, "as asked"
