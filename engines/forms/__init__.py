"""A target's own form of a graph: the same results from other nodes, made when an engine is built.

A rewrite is a function of one `Network`, which it changes; exact but for rounding. The form names the bundle's data files
as the bundle's graph does, from the same folder, and holds what a rewrite adds within itself.
"""

import importlib
from collections.abc import Callable, Iterable

from turbochain.engines.forms.network import Network
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BackendMissing

Rewrite = Callable[[Network], None]


def make(bundle: Bundle, graph: str, rewrites: Iterable[Rewrite]) -> bytes:
    """Return the form of a graph, whose files have been hashed, as a serialized ONNX model.

    Who reads it resolves its data from the folder of the bundle's graph: `bundle.plain(graph) / file` is in it. Raises
    BackendMissing if onnx is not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ModuleNotFoundError:
        raise BackendMissing("onnx, which engines for a GPU are built with, is not installed: pip install onnx") from None
    path = bundle.plain(graph) / bundle.manifest.graphs[graph].file
    model = onnx.load(path, load_external_data=False)
    for rewrite in rewrites:
        rewrite(Network(model, path.parent))
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized
