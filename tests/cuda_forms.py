"""Find the nodes of a graph's form that ONNX Runtime's CUDA provider would leave to the host, by its CPU provider."""

from pathlib import Path

import onnx

from turbochain.engines.forms.cuda import rewrite
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.backends import onnxruntime_sessions as sessions

ON_HOST = {"Shape", "Size", "ConstantOfShape", "Range", "NonZero", "Loop", "If", "GatherND"}
"""Operators that the CUDA provider leaves to the CPU, or which send something to the host or get it from there."""


def kinds(nodes: list[onnx.NodeProto]) -> set[str]:
    return {node.op_type for node in nodes}


def unequal(nodes: list[onnx.NodeProto]) -> list[str]:
    """The Splits that are given the sizes of their parts."""
    return [node.name for node in nodes if node.op_type == "Split" and len(node.input) > 1]


def ragged(form: onnx.ModelProto) -> list[str]:
    """The Concats of parts that are not all of one size."""
    inferred = onnx.shape_inference.infer_shapes(form).graph
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
    } | {tensor.name: [*tensor.dims] for tensor in inferred.initializer}
    joins = [node for node in inferred.node if node.op_type == "Concat"]
    return [node.name for node in joins if len({sizes[name][node.attribute[0].i] for name in node.input}) > 1]


def assert_all_on_gpu(path: Path, folder: Path) -> None:
    """The form of any graph leaves nothing to the host and stages nothing, as it runs; its data lies beside it."""
    form, options = rewrite(path), sessions.default_options()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    sessions.load(form, path.stem, options, sessions.CPU, {}, onnxruntime.CUDA_WITHOUT)
    found = list(onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node)
    assert found and not kinds(found) & {*ON_HOST, "GroupNormalization", "Pad"}, path.stem
    assert not unequal(found) and not ragged(onnx.load_from_string(form)), path.stem
