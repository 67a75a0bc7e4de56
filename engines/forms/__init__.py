"""A target's own form of a graph: the same results from other nodes, made when an engine is built.

A rewrite is a function that changes a `Network`; but for rounding its results stay as they were. A form reads the same
data files as the bundle's graph, from that graph's folder, and holds within itself what a rewrite adds. These modules
import onnx: a builder imports them when it compiles.
"""

from collections.abc import Callable, Iterable

import onnx

from turbochain.engines.forms.network import Network
from turbochain.runtime.bundle.opened import Bundle

Rewrite = Callable[[Network], None]


def make(bundle: Bundle, graph: str, rewrites: Iterable[Rewrite]) -> bytes:
    """Return the form of a graph, whose files have been hashed, as a serialized ONNX model.

    Whoever parses it is told that its data lies in the folder of `bundle.plain(graph) / file`, the bundle's own graph.
    """
    path = bundle.plain(graph) / bundle.manifest.graphs[graph].file
    model = onnx.load(path, load_external_data=False)
    for rewrite in rewrites:
        rewrite(Network(model, path.parent))
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized
