"""Our own form of a LoRA file: the parameters' names as the checkpoint has them, and where the LoRA came from.

Safetensors: `COMPONENT/PARAMETER/down` and `COMPONENT/PARAMETER/up` as the LoRA's file had them, `COMPONENT/PARAMETER/
scale` (alpha / rank) as float64. The metadata `turbochain_adapter` is JSON: an `AdapterOrigin`.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.strict_json import convert
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.adapters import Adapter

_METADATA = "turbochain_adapter"


@dataclass(frozen=True)
class AdapterOrigin:
    """Where a LoRA came from."""

    source: str  # name of the file
    sha256: str  # its digest, as in a manifest
    base: str  # the checkpoint that it changes
    license: str | None = None  # SPDX id or a name; None if nobody said


def write(adapter: Adapter, target: Path, base: str, license: str | None) -> None:
    """Write an adapter that was read from a LoRA file; of one in our own form, where it first came from is kept, and
    its licence if `license` is None. Raises InputError if the file cannot be written."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for component, added in adapter.components.items():
        for parameter, one in added.items():
            name = f"{component}/{parameter}"
            tensors |= {f"{name}/down": one.down, f"{name}/up": one.up, f"{name}/scale": np.array([one.scale])}
    first = origin(adapter.path) or AdapterOrigin(adapter.path.name, hashing.digest(adapter.path), base)
    told = replace(first, base=base, license=license or first.license)
    data = save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, {_METADATA: json.dumps(asdict(told))})
    write_atomically(target, data)


def origin(path: str | os.PathLike[str]) -> AdapterOrigin | None:
    """Return where the LoRA of a file in our own form came from; None of any other. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            told = (file.metadata() or {}).get(_METADATA)
        return None if told is None else convert(AdapterOrigin, json.loads(told))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} does not say where it came from ({error}); convert the LoRA again") from None


def digest(path: Path) -> str:
    """Return the digest of a LoRA's file, or of the one that it was converted from."""
    found = origin(path)
    return hashing.digest(path) if found is None else found.sha256
