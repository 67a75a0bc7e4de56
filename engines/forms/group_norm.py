"""A GroupNormalization becomes operators that ONNX Runtime's CUDA provider has kernels for, with constant shapes.

The provider has none for the operator itself. Instead it would take the operator's definition, which computes shapes on
the CPU.
"""

import numpy as np
import onnx_ir as ir

from turbochain.engines.forms.shapes import shape
from turbochain.runtime.errors import TurbochainError

INSTANCE_OPSET = 21
"""The last opset whose InstanceNormalization the provider has. That of the next one is new, as it may be in bf16."""


def expand_group_norms(model: ir.Model) -> int:
    """Replace, in the model itself, every GroupNormalization; return how many.

    Up to `INSTANCE_OPSET` the groups take the place of channels in an InstanceNormalization: in fp16 the normalised
    values are rounded once more, before they are scaled. In later opsets they are computed in fp32, of means.
    """
    found = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for norm in found:
        _replace(model.graph, norm)
    return len(found)


def _replace(graph: ir.Graph, norm: ir.Node) -> None:
    (x, weight, bias), groups = norm.inputs, norm.attributes["num_groups"].value
    sizes, epsilon = shape(x), norm.attributes.get_float("epsilon", 1e-5)
    if sizes is None:
        raise TurbochainError(f"the GroupNormalization {norm.name} reads a tensor whose shape is not known")
    tape = ir.tape.Tape()
    made = tape.op("Reshape", [x, _sizes(tape, sizes[0], groups, -1)])
    if graph.opset_imports[""] <= INSTANCE_OPSET:
        ones, zeros = (_constant(tape, value(groups, weight.dtype.numpy())) for value in (np.ones, np.zeros))
        made = tape.op("InstanceNormalization", [made, ones, zeros], {"epsilon": epsilon})
    else:
        made = tape.op("Cast", [_of_means(tape, made, epsilon)], {"to": weight.dtype})
    made = tape.op("Reshape", [made, _sizes(tape, *sizes)])
    per_channel = _sizes(tape, sizes[1], *(1,) * (len(sizes) - 2))
    made = tape.op("Mul", [made, tape.op("Reshape", [weight, per_channel])])
    made = tape.op("Add", [made, tape.op("Reshape", [bias, per_channel])])
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], tape.nodes, norm.outputs, [made])


def _of_means(tape: ir.tape.Tape, x: ir.Value, epsilon: float) -> ir.Value:
    """Normalise [B, G, …] over its last axis; the result is fp32."""
    wide = tape.op("Cast", [x], {"to": ir.DataType.FLOAT})
    last = _sizes(tape, -1)
    centred = tape.op("Sub", [wide, tape.op("ReduceMean", [wide, last])])
    variance = tape.op("ReduceMean", [tape.op("Mul", [centred, centred]), last])
    deviation = tape.op("Sqrt", [tape.op("Add", [variance, _constant(tape, np.array(epsilon, np.float32))])])
    return tape.op("Div", [centred, deviation])


def _sizes(tape: ir.tape.Tape, *values: int) -> ir.Value:
    return _constant(tape, np.array(values, np.int64))


def _constant(tape: ir.tape.Tape, values: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(values)})
