"""ONNX Runtime: on a CPU a graph is loaded from the bundle; in int8, and for CUDA, a form of it is written."""

from turbochain.engines.backends import int8
from turbochain.engines.backends.contract import Builder, Compilation, Option
from turbochain.runtime.backends.onnxruntime import form_file
from turbochain.runtime.bundle import quantization, writing


def compile(compilation: Compilation) -> list[str]:
    """Write the forms of a graph in int8, one for each candidate, or the one that the CUDA provider runs whole.

    Nothing is written of another graph for a CPU. Returns the files' names.
    """
    c = compilation
    if quantization.in_int8(c.bundle.manifest.graphs[c.graph], c.options):
        forms = _in_int8(c)
    elif c.device.kind == "cpu":
        forms = {}
    else:
        from turbochain.engines.forms.cuda import rewrite  # it imports onnx

        forms = {form_file(c.graph): rewrite(c.path)}
    for name, form in forms.items():
        writing.write_atomically(c.folder / name, form)
    return list(forms)


def _in_int8(c: Compilation) -> dict[str, bytes]:
    """Return the forms of a graph in int8 by their files' names."""
    from turbochain.engines.forms.int8 import quantize

    found = {}
    for candidate in int8.candidates(c.options):
        kept = quantization.kept(c.bundle, c.graph, "onnxruntime", {**c.options, **candidate})
        found[form_file(c.graph, candidate["int8_error"])] = quantize(c.path, kept)
    return found


OPTIONS = {"prefer_nhwc": Option(False, "on a GPU let convolutions and norms work channels last"), **int8.OPTIONS}

BUILDER = Builder(
    name="onnxruntime",
    reads_graphs=True,
    options=OPTIONS,
    compile=compile,
    candidates=int8.candidates,
    int8_of=("fp32",),
)
