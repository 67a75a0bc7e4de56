"""ONNX Runtime: nothing is written; a stage is loaded from its graph, which optimises it in memory."""

from typing import Any

READS_GRAPHS = True
OPTIONS: dict[str, Any] = {}
"""The options that an engine is built with: part of its key."""
