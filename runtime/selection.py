"""Choose the engine of a bundle that fits this machine, and open it."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turbochain.runtime import backends
from turbochain.runtime.backends import cpus
from turbochain.runtime.backends.contract import Executor, Opened
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Engine, EngineKey
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.paths import blobs
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import BundleError, InputError


@dataclass(frozen=True)
class Found:
    """An engine on this disk."""

    folder: Path
    engine: Engine

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.name


def folders(bundle: Bundle, engines: str | Path | None = None) -> list[Path]:
    """Return where engines of the bundle are looked for: `engines`, or its own folder, if trusted, and the cache."""
    own = [bundle.path / "engines"] if bundle.trusts_engines else []
    return [Path(engines)] if engines is not None else [*own, _cache(bundle)]


def folder_to_write(bundle: Bundle, engines: str | Path | None = None) -> Path:
    """Return where an engine is built: `engines`, the bundle's own folder, or the user's cache.

    The cache is for a bundle that is read-only, or lies in the hub's cache.
    """
    own, cache = bundle.path / "engines", _cache(bundle)
    if engines is not None:
        return Path(engines)
    writable = blobs(bundle.path) is None and os.access(own if own.exists() else bundle.path, os.W_OK)
    return own if writable else cache


def _cache(bundle: Bundle) -> Path:
    return hashing.user_cache() / "engines" / bundle.id


def misfit(chain: OpenChain, engine: Engine, device: str | None = None) -> str | None:
    """Return why an engine does not run a chain on this machine, as a phrase; None if it does."""
    key = engine.key
    if key.backend not in backends.names():
        return f"it is for the backend {key.backend}, which this version does not have"
    backend, library = backends.get(key.backend), backends.library(key.backend)
    if library is None:
        return f"its backend {key.backend} is not installed: {backend.install}"
    try:
        reason = backend.misfit(replace(key, options=engine.options), library, backend.device(device))
    except InputError as error:  # no such device here
        return str(error)
    return reason or lacks(chain, engine)


def lacks(chain: OpenChain, engine: Engine) -> str | None:
    """Return which graphs of a chain the engine has not, or not as they are now, as a phrase; None if it has all."""
    digests = chain.digests(engine.options)
    if lacking := [name for name in digests if name not in engine.graphs]:
        return f"it lacks {', '.join(lacking)} of the chain {chain.name}"
    if any(engine.graphs[name].digest != digest for name, digest in digests.items()):
        return "it was built from other graphs"
    return None


def rebuild(bundle: Bundle, engine: Engine, folder: Path | None = None) -> str:
    """Return the command that builds such an engine for this machine, in `folder` (None: the default one)."""
    options = "".join(f" -O {name}={value}" for name, value in engine.ordered.items())
    return _command(bundle, engine.key.backend, None, folder) + options


def _command(bundle: Bundle, backend: str | None, device: str | None, engines: str | Path | None) -> str:
    given = (("--backend", backend), ("--device", device), ("--engines", engines))
    chosen = "".join(f" {option} {shlex.quote(str(value))}" for option, value in given if value is not None)
    return f"build-engine {shlex.quote(str(bundle.path))}{chosen}"


def has_device(backend: str) -> bool:
    """Return whether this machine has a device that the backend runs on."""
    try:
        backends.get(backend).device(None)
    except InputError:
        return False
    return True


def select(
    chain: OpenChain,
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    engines: str | Path | None = None,
) -> Found:
    """Return the best engine that fits; if several have the same rank, the one that was built last.

    One that runs elsewhere is returned only if the backend or the engine is named. `engine`: only the one with this
    folder name. `engines`: the folder that holds them (see `folders`). Raises BundleError, which says why no engine
    fits, InputError if there is no engine of that name.
    """
    bundle = chain.bundle
    if backend is not None:
        backends.require(backend)
        backends.get(backend).device(device)  # if there is none, that is what helps
    found = dict(_engines(bundle, engines))
    names = [path.name for path in found]
    if engine not in (None, *names):
        raise InputError(f"{bundle.path} has no engine {engine!r}: choose from {', '.join(names) or 'none'}")
    reasons, fitting = [], []
    for path, made in found.items():
        if engine not in (None, path.name):
            continue
        if isinstance(made, BundleError):
            reasons.append(str(made))
        elif backend not in (None, made.key.backend):
            reasons.append(f"{path.name}: it is for the backend {made.key.backend}")
        elif reason := misfit(chain, made, device):
            reasons.append(f"{path.name}: {reason}")
        elif backend is engine is None and (command := backends.get(made.key.backend).elsewhere):
            reasons.append(f"{path.name}: it is for {command}, and draws here only with --engine {path.name}")
        else:
            fitting.append(Found(path, made))
    if fitting:
        return max(fitting, key=lambda found: (_rank(found.engine.key), found.engine.created))
    if backend is None:
        backends.best(device)  # with no backend at all, its `pip install` line is what helps
    why = "; ".join(reasons) or (
        "it has none"
        if bundle.trusts_engines
        else "engines that came with it from the hub are ignored without --trust-engines"
    )
    command = _command(bundle, backend, device, engines)
    raise BundleError(f"{bundle.path} has no engine for this machine ({why}); build one: {command}")


def select_for_any(
    chains: Sequence[OpenChain],
    backend: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    engines: str | Path | None = None,
) -> Found:
    """Return what `select` returns for the first chain that an engine runs; if there is none, raise its error."""
    refusals = []
    for chain in chains:
        try:
            return select(chain, backend, device, engine, engines)
        except BundleError as error:
            refusals.append(error)
    raise refusals[0]


def _engines(bundle: Bundle, engines: str | Path | None) -> Iterator[tuple[Path, Engine | BundleError]]:
    for folder in folders(bundle, engines):
        for name, made in bundle.engines(folder).items():
            yield folder / name, made


def _rank(key: EngineKey) -> int:
    return backends.get(key.backend).preferences[key.device].rank


def admit(chain: OpenChain, found: Found) -> None:
    """Hash everything that a chain reads of the bundle and of the engine; BundleError if anything is not as it was.

    The engine's own files are code, so they are always read. An engine may be older than the chain: BundleError says
    what it lacks.
    """
    if missing := lacks(chain, found.engine):
        folder = found.folder.parent
        command = rebuild(chain.bundle, found.engine, None if folder in folders(chain.bundle) else folder)
        raise BundleError(f"the engine {found.name} does not run this chain ({missing}); add it: {command}")
    records = {name: r for g in chain.graphs for name, r in found.engine.graphs[g].files.items()}
    hashing.check_all(found.folder, records, full=True)
    chain.bundle.check_files(chain.files)


def open_executor(
    bundle: Bundle,
    found: Found,
    *,
    device: str | None = None,
    threads: int | None = None,
    profile: bool = False,
    keep_all: bool = False,
) -> Executor:
    """Return an executor for an engine, with nothing loaded; `admit` comes before a chain's graphs are loaded.

    `threads` None: the backend's own choice, or what a container's quota allows. `profile`, `keep_all`: see `Opened`.
    Raises InputError for a number that is more than this process may use.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads!r}: a whole number of at least 1 was expected")
    if threads is not None and threads > (most := cpus.available()):
        raise InputError(
            f"threads={threads}: at most {most} was expected, one for each CPU that this process may use (its affinity "
            "and its container's quota are counted); give fewer, or leave it to the backend"
        )
    if threads is None and (quota := cpus.quota()) is not None and quota < cpus.allowed():
        threads = quota  # the backends count the CPUs, and not how much of their time there is
    backend = backends.get(found.engine.key.backend)
    where = backend.device(device)
    return backend.executor(Opened(bundle, found.folder, found.engine.options, where, threads, profile, keep_all))
