"""The form of a graph that TensorRT compiles. Only the serialized engine is kept."""

from pathlib import Path

from turbochain.engines.forms import form
from turbochain.engines.forms.norm_first import norm_first
from turbochain.engines.forms.qkv import merge_qkv
from turbochain.engines.forms.transposed import merge_upsampling

REWRITES = (norm_first, merge_upsampling, merge_qkv)


def rewrite(path: Path) -> bytes:
    """Return an ONNX file's graph in that form, see `form`. Raises TurbochainError if the file is no graph."""
    return form(path, REWRITES)
