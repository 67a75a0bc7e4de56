"""ONNX Runtime: nothing is written; compiling a stage is loading it, which optimises the graph in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbochain.runtime.backends import Device
from turbochain.runtime.backends.onnxruntime import executor
from turbochain.runtime.bundle import Bundle

OPTIONS: dict[str, Any] = {}
"""The options that an engine is built with: part of its key."""


def compile(
    bundle: Bundle,
    graph: str,
    folder: Path,
    options: dict[str, Any],
    device: Device,
    cache: Path,
    progress: Callable[[int, int], None],
) -> list[str]:
    """See that ONNX Runtime takes the graph; returns the names of the files written into `folder`: none.

    Raises TurbochainError where it does not take it.
    """
    executor(bundle, folder, options, device=device, threads=None, graphs=[graph]).close()
    return []
