"""The LoRA files that are fused into a checkpoint's weights, read and checked without torch."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import adapters
from turbochain.runtime.inputs.adapter_names import PREFIXES
from turbochain.runtime.inputs.adapters import Adapter


def read_all(checkpoint: Checkpoint) -> list[tuple[Adapter, float]]:
    """Return the checkpoint's LoRA files, read, each with its strength; InputError if one does not fit the weights."""
    return _read(checkpoint, checkpoint.adapters)


def read_references(checkpoint: Checkpoint) -> list[tuple[Adapter, float]]:
    """Return the LoRA files to record cases with, as `read_all`."""
    return _read(checkpoint, checkpoint.references)


def _read(checkpoint: Checkpoint, files: Sequence[tuple[Path, float]]) -> list[tuple[Adapter, float]]:
    if not files:
        return []
    components = [c for c in checkpoint.family.components if c in PREFIXES]
    shapes = {c: _shapes(checkpoint.weights[c]) for c in components}
    return [(adapters.read(path, shapes), strength) for path, strength in files]


def require_peft() -> None:
    """Raise InputError if peft is missing, with which diffusers applies LoRA files for the reference."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "the package peft is not installed, and diffusers needs it to apply a LoRA for the reference pictures: "
            "pip install peft"
        )


def _shapes(weights: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in weights:
        with safe_open(path, framework="numpy") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found
