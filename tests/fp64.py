"""Run a graph in fp64, so that equal arithmetic can be told from arithmetic that is nearly equal."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

TO_FP64 = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8)


def in_fp64(path: Path) -> onnx.ModelProto:
    """A graph with everything of fp16, fp32 and uint8 in fp64: weights, constants, casts, ends. Nothing is rounded."""
    model = onnx.load(path)
    graph = model.graph
    scales = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}  # always fp32
    for tensor in (*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))):
        if tensor.data_type in TO_FP64 and tensor.name not in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            stash = node.op_type == "GroupNormalization" and attribute.name == "stash_type"
            if stash or (attribute.name == "to" and attribute.i in TO_FP64):
                attribute.i = TensorProto.DOUBLE
        if node.op_type == "Round":
            node.op_type = "Identity"
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in TO_FP64:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model
