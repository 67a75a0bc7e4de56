"""The backends: one module each, found by its file. A module offers

- `LIBRARIES`: the distributions that provide it, in order of preference;
- `INSTALL`: the command that installs it;
- `PREFERENCES`: kind of device ("cpu", "cuda") → `Preference`;
- `device(name: str | None) -> Device`: the device that `name` means (None: the default one); InputError where
  there is none, with the reason;
- `misfit(key, library, device) -> str | None`: why an engine of this key does not run there, as a phrase
  (`exact` where nothing may differ);
- perhaps `precision(graph, options) -> str`: what an engine with these options computes a graph in, where that is not
  the graph's own precision;
- `executor(bundle, folder, options, *, device, threads, graphs)`: a `host.HostExecutor` or a `device.DeviceExecutor`.

Nothing here imports a backend's library before an executor is made.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from turbochain.runtime.bundle.manifest import EngineKey, Gpu, Graph
from turbochain.runtime.errors import BackendMissing, InputError

_SHARED = ("cpu", "gpu", "cuda", "openvino_model")


@dataclass(frozen=True)
class Device:
    """Where an executor runs."""

    kind: str  # "cpu" or "cuda"
    index: int = 0  # the CUDA ordinal
    gpu: Gpu | None = None  # where the kind is "cuda"

    def __str__(self) -> str:
        return str(self.gpu) if self.gpu else self.kind


@dataclass(frozen=True)
class Preference:
    """What a backend is like on one kind of device."""

    rank: int  # which backend is chosen where several could be: the highest
    reason: str  # why, as a phrase
    precisions: tuple[str, ...]  # what it computes in; the first is what a bundle is exported in by default


def names() -> list[str]:
    """Every backend that this version has, installed or not, best first."""
    return sorted(_modules(), key=lambda name: -max(p.rank for p in get(name).PREFERENCES.values()))


def _modules() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED]


def get(name: str) -> ModuleType:
    """The backend's module; InputError where there is none of that name."""
    if name not in _modules():
        raise InputError(f"there is no backend {name!r}: choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def library(name: str) -> tuple[str, str] | None:
    """The installed distribution behind a backend and its version, or None."""
    from importlib import metadata  # 20 ms that an import of the package need not take

    for distribution in get(name).LIBRARIES:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def require(name: str) -> tuple[str, str]:
    """Like `library`, but BackendMissing with the command that mends it."""
    found = library(name)
    if found is None:
        raise BackendMissing(f"the backend {name} is not installed: {get(name).INSTALL}")
    return found


def preference(name: str, device: Device) -> Preference:
    """What the backend is like on that device."""
    return get(name).PREFERENCES[device.kind]


def precisions(name: str, options: Mapping[str, Any], graphs: Mapping[str, Graph]) -> dict[str, str]:
    """Graph → what an engine of the backend with these options computes it in."""
    module = get(name)
    if not hasattr(module, "precision"):
        return {g: graph.precision for g, graph in graphs.items()}
    return {g: module.precision(graph, options) for g, graph in graphs.items()}


def require_precision(name: str, device: Device, precision: str) -> None:
    """InputError where the backend cannot compute in this precision on that device."""
    if precision not in (able := preference(name, device).precisions):
        raise InputError(
            f"the backend {name} cannot compute in {precision} on {device}, only in {' and '.join(able)}: choose "
            "another precision with build-engine's --precision or --vae-precision, or another backend with --backend"
        )


def exact(key: EngineKey, library: tuple[str, str], device: Device) -> str | None:
    """The strictest `misfit`: same library, same version, same kind of device."""
    if library != (key.library, key.version):
        return f"it was built with {key.library} {key.version}, and this machine has {' '.join(library)}"
    built, here = ((g.name, g.compute_capability) if g else None for g in (key.gpu, device.gpu))
    if (key.device, built) != (device.kind, here):
        return f"it is for {key.gpu or key.device}, and this device is {device}"
    return None


def best(device: str | None = None) -> tuple[str, str]:
    """The best backend for a device of this machine (None: any) and the reason; BackendMissing where there is none."""
    usable, reasons = [], []
    for name in names():
        try:
            require(name)
            usable.append((preference(name, get(name).device(device)), name))
        except InputError as error:
            reasons.append(str(error))
    if not usable:
        raise BackendMissing("no backend can run here: " + "; ".join(reasons))
    found, name = max(usable, key=lambda item: item[0].rank)
    return name, found.reason
