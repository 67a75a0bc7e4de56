"""The backends: one module each with one constant `BACKEND` (see `contract`), discovered automatically."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from turbochain.runtime.backends.contract import Backend, Device, Preference
from turbochain.runtime.bundle.manifest import EngineKey, Graph
from turbochain.runtime.errors import BackendMissing, InputError


@cache
def known() -> dict[str, Backend]:
    """Return every backend that this version has by name, installed or not, best first."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found = [b for module in modules if isinstance(b := vars(module).get("BACKEND"), Backend)]
    best_first = sorted(found, key=lambda b: -max(p.rank for p in b.preferences.values()))
    return {backend.name: backend for backend in best_first}


def names() -> list[str]:
    """Return the names of the backends that this version has, best first."""
    return list(known())


def get(name: str) -> Backend:
    """Return the backend; InputError if there is none of that name."""
    if name not in known():
        raise InputError(f"there is no backend {name!r}: choose from {', '.join(names())}")
    return known()[name]


def library(name: str) -> tuple[str, str] | None:
    """Return the installed distribution behind a backend and its version, or None."""
    from importlib import metadata  # 20 ms that an import of the package need not take

    for distribution in get(name).libraries:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def require(name: str) -> tuple[str, str]:
    """Return the same as `library`; raises BackendMissing with the command that installs it if there is none."""
    found = library(name)
    if found is None:
        raise BackendMissing(f"the backend {name} is not installed: {get(name).install}")
    return found


def preference(name: str, device: Device) -> Preference:
    """Return the backend's traits on that device."""
    return get(name).preferences[device.kind]


def precisions(name: str, options: Mapping[str, Any], graphs: Mapping[str, Graph]) -> dict[str, str]:
    """Return graph → the precision that an engine of the backend with these options computes it in."""
    backend = get(name)
    return {g: backend.precision(graph, options) for g, graph in graphs.items()}


def require_precision(name: str, device: Device, precision: str) -> None:
    """Raise InputError if the backend cannot compute in this precision on that device."""
    if precision not in (able := preference(name, device).precisions):
        raise InputError(
            f"the backend {name} cannot compute in {precision} on {device}, only in {' and '.join(able)}: choose "
            "another precision with build-engine's --precision or --vae-precision, or another backend with --backend"
        )


def exact(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """Return why an engine does not fit if nothing may differ: not the library, its version, or the device."""
    if library != (key.library, key.version):
        return f"it was built with {key.library} {key.version}, and this machine has {' '.join(library)}"
    built, here = ((g.name, g.compute_capability) if g else None for g in (key.gpu, device.gpu))
    if (key.device, built) != (device.kind, here):
        return f"it is for {key.gpu or key.device}, and this device is {device}"
    return None


def best(device: str | None = None) -> tuple[str, str]:
    """Return the best backend for a device here (None: any) and the reason; BackendMissing if there is none."""
    usable, reasons = [], []
    for name in (name for name, backend in known().items() if not backend.elsewhere):
        try:
            require(name)
            usable.append((preference(name, get(name).device(device)), name))
        except InputError as error:
            reasons.append(str(error))
    if not usable:
        raise BackendMissing("no backend can run here: " + "; ".join(reasons))
    found, name = max(usable, key=lambda item: item[0].rank)
    return name, found.reason
