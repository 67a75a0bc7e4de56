"""A target's own form of a graph: it computes the same, and suits the target's library better.

A rewrite changes a model (onnx_ir.Model, with shapes) itself, and returns in how many places. A form reads the same
data files as the bundle's graph, from that graph's folder, and holds within itself what a rewrite adds. These modules
import onnx and onnx_ir, so a builder imports them when it compiles.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from turbochain.engines.forms import shapes

Rewrite = Callable[[ir.Model], int]


def form(path: Path, rewrites: Iterable[Rewrite]) -> bytes:
    """Return the graph of an ONNX file, rewritten and serialized; the data that it refers to lies beside that file.

    Raises TurbochainError if the file is no graph.
    """
    model = shapes.read(path)
    for rewrite in rewrites:
        rewrite(model)
    RemoveUnusedNodesPass()(model)
    serialized: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return serialized
