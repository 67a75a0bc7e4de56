"""Find the engines that exist, and the part of each that a new build can keep."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from turbochain.engines import backends as builders
from turbochain.engines.order import EngineOrder
from turbochain.runtime import backends, selection
from turbochain.runtime.backends import Device
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Engine, EngineGraph, EngineKey
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import BundleError, InputError
from turbochain.runtime.selection import Found


def device(backend: str, name: str | None, target: str | None) -> Device:
    """Return the device that an engine is for; InputError if there is none or the backend cannot build for it."""
    chosen = backends.get(backend)
    if target is None:
        return chosen.device(name)
    if chosen.target is None:
        raise InputError(f"target {target!r}: the backend {backend} builds only for the machine that it runs on")
    return chosen.target(target)


def key_of(order: EngineOrder) -> EngineKey:
    """Return the key of the engine that was ordered, with the options that this machine decides."""
    where = device(order.backend, order.device, order.target)
    library, version = backends.require(order.backend)
    chosen = builders.get(order.backend).settle(order.options)
    return EngineKey(order.backend, where.kind, library, version, chosen, where.gpu)


def folder_name(key: EngineKey) -> str:
    """Return the name of an engine's folder: backend, device, and a part of the key's SHA-256."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(key), sort_keys=True).encode()).hexdigest()
    short = f"sm{key.gpu.compute_capability.replace('.', '')}" if key.gpu else key.device
    return f"{key.backend}-{short}-{digest[:12]}"


def chains_of(bundle: Bundle, names: Collection[str] | None) -> list[OpenChain]:
    """Return the chains with these names (None: all); if the bundle lacks one, the InputError lists those that it
    has."""
    have = bundle.manifest.chains
    check_chains(names, have, bundle.path)
    return [bundle.open_chain(name) for name in have if names is None or name in names]


def check_chains(names: Collection[str] | None, have: Collection[str], path: Path) -> None:
    """Raise InputError if the bundle at `path` lacks a chain with one of the names."""
    if unknown := [name for name in names or () if name not in have]:
        raise InputError(f"there is no chain {', '.join(unknown)} in {path}: choose --chains from {', '.join(have)}")


def find(bundle: Bundle, engines: Path | None, key: EngineKey) -> Iterator[tuple[Found, Found]]:
    """Find the engines of this key: each as it is on disk, and with only the graphs that a build keeps."""
    for folder in selection.folders(bundle, engines):
        made = bundle.engines(folder).get(folder_name(key))
        if isinstance(made, Engine) and made.key == key:
            found = Found(folder / folder_name(key), made)
            yield found, Found(found.folder, _usable(bundle, found))


def _usable(bundle: Bundle, found: Found) -> Engine:
    graphs = {name: made for name, made in found.engine.graphs.items() if _is_usable(bundle, found, name, made)}
    chains = [bundle.open_chain(name) for name in bundle.manifest.chains]
    have = {chain.name: chain.digest for chain in chains if chain.graphs.keys() <= graphs.keys()}
    verified = {name: digest for name, digest in found.engine.verified.items() if have.get(name) == digest}
    checks = {name: checks for name, checks in found.engine.checks.items() if name in verified}
    return dataclasses.replace(found.engine, graphs=graphs, checks=checks, verified=verified)


def _is_usable(bundle: Bundle, found: Found, name: str, made: EngineGraph) -> bool:
    if name not in bundle.manifest.graphs or made.digest != bundle.graph_digest(name, found.engine.options):
        return False
    try:
        hashing.check_all(found.folder, made.files, full=False)
    except BundleError:
        return False
    return True


def lacks(engine: Engine, wanted: Collection[OpenChain], verified: bool) -> bool:
    """Return whether an engine lacks a graph of these chains, or (if `verified`) the checks of one."""
    graphs = {name for chain in wanted for name in chain.graphs}
    return not graphs <= {*engine.graphs} or (verified and not {c.name for c in wanted} <= {*engine.checks})
