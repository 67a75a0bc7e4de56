"""ONNX Runtime: nothing is written; compiling a stage is loading it, which optimises the graph in memory."""

from pathlib import Path
from typing import Any

from turbochain.runtime.backends.onnxruntime import Executor
from turbochain.runtime.bundle import Bundle


def compile(bundle: Bundle, graph: str, folder: Path, options: dict[str, Any], device: str) -> list[str]:
    """See that ONNX Runtime takes the graph, and write nothing. Raises TurbochainError where it does not."""
    Executor(bundle, folder, options, device=device, threads=None, graphs=[graph]).close()
    return []
