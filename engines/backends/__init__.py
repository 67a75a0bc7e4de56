"""The builders: one module for each backend with one constant `BUILDER` (see `contract`), discovered automatically."""

import importlib
import pkgutil
from functools import cache

from turbochain.engines.backends.contract import Builder
from turbochain.runtime import backends
from turbochain.runtime.errors import InputError


@cache
def known() -> dict[str, Builder]:
    """Return every builder by the name of its backend, that of the best backend first."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found = {b.name: b for module in modules if isinstance(b := vars(module).get("BUILDER"), Builder)}
    return {name: found[name] for name in backends.names() if name in found}


def get(backend: str) -> Builder:
    """Return the builder of a backend; InputError if there is none."""
    if backend not in known():
        raise InputError(f"there is no builder for the backend {backend!r}: choose from {', '.join(known())}")
    return known()[backend]
