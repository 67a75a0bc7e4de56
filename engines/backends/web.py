"""ONNX Runtime Web: a form of every graph, which suits a browser's GPU; `turbochain export-web` takes it there."""

from turbochain.engines.backends.contract import Builder, Task
from turbochain.runtime.backends.onnxruntime import form_file
from turbochain.runtime.bundle import writing


def compile(task: Task) -> list[str]:
    """Write the form of a graph, whose data are the bundle's files; returns the file's name."""
    from turbochain.engines.forms import form  # it imports onnx
    from turbochain.engines.forms.attention import fuse_attention

    path = task.bundle.plain(task.graph) / task.bundle.manifest.graphs[task.graph].file
    name = form_file(task.graph)
    writing.write_atomically(task.folder / name, form(path, [fuse_attention]))
    return [name]


BUILDER = Builder(name="web", reads_graphs=True, options={}, compile=compile)
