"""The form of a graph that ONNX Runtime's CUDA provider runs whole, leaving nothing to the host."""

from pathlib import Path

from turbochain.engines.forms import form
from turbochain.engines.forms.bf16 import widen
from turbochain.engines.forms.group_norm import expand_group_norms
from turbochain.engines.forms.staged import cut_concats, gather_rows

REWRITES = (expand_group_norms, widen, gather_rows, cut_concats)


def rewrite(path: Path) -> bytes:
    """Return an ONNX file's graph in that form, see `form`. Raises TurbochainError if the file is no graph."""
    return form(path, REWRITES)
