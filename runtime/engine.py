"""Which engine of a bundle fits this machine, and opening it."""

from pathlib import Path
from typing import Any

from turbochain.runtime import backends, files
from turbochain.runtime.bundle import Bundle
from turbochain.runtime.errors import BundleError, InputError
from turbochain.runtime.manifest import Engine


def misfit(bundle: Bundle, engine: Engine, device: str | None = None) -> str | None:
    """Why an engine does not fit this machine and this bundle, as a phrase; None where it fits."""
    key = engine.key
    if key.backend not in backends.names():
        return f"it is for the backend {key.backend}, which this version does not have"
    library = backends.library(key.backend)
    if library is None:
        return f"its backend {key.backend} is not installed: {backends.get(key.backend).INSTALL}"
    if library != (key.library, key.version):
        return f"it was built with {key.library} {key.version}, and this machine has {' '.join(library)}"
    if key.device != backends.get(key.backend).device(device):
        return f"it is for the device {key.device}"
    if key.graphs != bundle.graph_digests():
        return "it was built from other graphs"
    return None


def select(bundle: Bundle, backend: str | None = None, device: str | None = None) -> tuple[str, Engine]:
    """The folder name and manifest of the best engine that fits; BundleError says why none does."""
    if backend is not None:
        backends.require(backend)
    reasons, fitting = [], []
    for name, engine in bundle.engines().items():
        if isinstance(engine, BundleError):
            reasons.append(str(engine))
        elif backend not in (None, engine.key.backend):
            reasons.append(f"{name}: it is for the backend {engine.key.backend}")
        elif reason := _misfit(bundle, engine, device):
            reasons.append(f"{name}: {reason}")
        else:
            fitting.append((name, engine))
    if fitting:
        return max(fitting, key=lambda item: backends.get(item[1].key.backend).RANK)
    if backend is None:
        backends.best()  # with no backend at all, its `pip install` line is what helps
    why = "; ".join(reasons) or "it has none"
    option = f" --backend {backend}" if backend else ""
    raise BundleError(
        f"{bundle.path} has no engine for this machine ({why}); build one: build-engine {bundle.path}{option}"
    )


def _misfit(bundle: Bundle, engine: Engine, device: str | None) -> str | None:
    try:
        return misfit(bundle, engine, device)
    except InputError as error:  # a device that this engine's backend does not know
        return str(error)


def open_executor(
    bundle: Bundle,
    name: str,
    engine: Engine,
    *,
    device: str | None = None,
    threads: int | None = None,
    full: bool = False,
) -> Any:
    """Hash everything that the engine reads, then load it. `full` hashes large files in any case."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads={threads!r}: a whole number of at least 1 was expected")
    folder = bundle.path / "engines" / name
    files.check_all(folder, engine.files, full=full)
    check_inputs(bundle, full=full)
    return executor(bundle, engine.key.backend, folder, engine.key.options, device=device, threads=threads)


def check_inputs(bundle: Bundle, *, full: bool = False) -> None:
    """Hash what the text-to-image chain reads."""
    graphs = [f for g in bundle.chain.graphs for f in bundle.manifest.graphs[g].files]
    bundle.check_files([*graphs, *(t.file for t in bundle.manifest.tokenizers.values())], full=full)


def executor(
    bundle: Bundle,
    backend: str,
    folder: Path,
    options: dict[str, Any],
    *,
    device: str | None,
    threads: int | None,
) -> Any:
    """The backend's executor for an engine's folder, whose files have been hashed."""
    module = backends.get(backend)
    return module.Executor(bundle, folder, options, device=module.device(device), threads=threads)
