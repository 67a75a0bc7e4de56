"""The backends: one module each, found by its file. A module offers

- `LIBRARIES`: the distributions that provide it, in order of preference;
- `INSTALL`: the command that installs it;
- `RANK`: which is preferred where several are installed (higher wins), with `REASON`, a phrase;
- `PRECISION`: what a bundle is exported in for it where the user does not say;
- `PRECISIONS`: those of `bundle.PRECISIONS` that it can compute in;
- `device(name: str | None) -> str`: the identity of the device that `name` means (None: the default one);
  InputError where there is none, with the reason;
- `Executor(bundle, folder, options, *, device, threads, graphs)`: see `host.HostExecutor`, the one for host memory.

Nothing here imports a backend's library before an `Executor` is made.
"""

import importlib
import pkgutil
from importlib import metadata
from types import ModuleType

from turbochain.runtime.errors import BackendMissing, InputError


def names() -> list[str]:
    """Every backend that this version has, installed or not, best first."""
    return sorted(_modules(), key=lambda name: -get(name).RANK)


def _modules() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name != "host"]


def get(name: str) -> ModuleType:
    """The backend's module; InputError where there is none of that name."""
    if name not in _modules():
        raise InputError(f"there is no backend {name!r}: choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def library(name: str) -> tuple[str, str] | None:
    """The installed distribution behind a backend and its version, or None."""
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


def require_precision(name: str, precision: str) -> None:
    """InputError where the backend cannot compute in this precision."""
    if precision not in (able := get(name).PRECISIONS):
        raise InputError(
            f"the backend {name} cannot compute in {precision}, only in {' and '.join(able)}: choose another precision "
            "with build-engine's --precision or --vae-precision, or another backend with --backend"
        )


def _has_device(name: str) -> bool:
    try:
        get(name).device(None)
    except InputError:
        return False
    return True


def best() -> tuple[str, str]:
    """The best installed backend and the reason for the choice; BackendMissing where there is none."""
    installed = [name for name in names() if library(name) and _has_device(name)]
    if not installed:
        lines = "; or ".join(get(name).INSTALL for name in names())
        raise BackendMissing(f"no backend is installed: {lines}")
    return installed[0], get(installed[0]).REASON
