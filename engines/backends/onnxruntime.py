"""ONNX Runtime: on a CPU nothing is written, and a graph is loaded from the bundle; for CUDA its form is written."""

from turbochain.engines.backends.contract import Builder, Compilation, Option
from turbochain.runtime.backends.onnxruntime import form_file
from turbochain.runtime.bundle import writing


def compile(compilation: Compilation) -> list[str]:
    """Write the form of a graph that the CUDA provider runs whole, and nothing for a CPU; returns the file's name."""
    if compilation.device.kind == "cpu":
        return []
    from turbochain.engines.forms.cuda import rewrite  # it imports onnx

    name = form_file(compilation.graph)
    writing.write_atomically(compilation.folder / name, rewrite(compilation.path))
    return [name]


OPTIONS = {"prefer_nhwc": Option(False, "on a GPU let convolutions and norms work channels last")}

BUILDER = Builder(name="onnxruntime", reads_graphs=True, options=OPTIONS, compile=compile)
