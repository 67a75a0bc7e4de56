"""ONNX Runtime Web: a form of every graph, which suits a browser's GPU; `turbochain export-web` takes it there."""

from turbochain.engines.backends.contract import Builder, Compilation
from turbochain.runtime.backends.onnxruntime import form_file
from turbochain.runtime.bundle import writing


def compile(compilation: Compilation) -> list[str]:
    """Write the form of a graph, whose data are the bundle's files; returns the file's name."""
    from turbochain.engines.forms import form  # it imports onnx
    from turbochain.engines.forms.attention import fuse_attention

    name = form_file(compilation.graph)
    writing.write_atomically(compilation.folder / name, form(compilation.path, [fuse_attention]))
    return [name]


BUILDER = Builder(name="web", reads_graphs=True, options={}, compile=compile)
