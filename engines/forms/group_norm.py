"""A GroupNormalization becomes an InstanceNormalization of its groups, with constant shapes.

ONNX Runtime's CUDA provider has no kernel for the former. Instead it would take the operator's definition, which
computes shapes on the CPU.
"""

import numpy as np
import onnx_ir as ir

from turbochain.engines.forms.shapes import shape
from turbochain.runtime.errors import TurbochainError


def by_instance(model: ir.Model) -> int:
    """Replace, in the model itself, every GroupNormalization; return how many.

    In fp16 the normalised values are rounded once more, before they are scaled. In bf16, for which the provider has no
    InstanceNormalization either, they are computed in fp32.
    """
    found = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for norm in found:
        _replace(model.graph, norm)
    return len(found)


def _replace(graph: ir.Graph, norm: ir.Node) -> None:
    x, weight, bias = norm.inputs
    sizes, dtype, groups = shape(x), weight.dtype, norm.attributes["num_groups"].value
    if sizes is None:
        raise TurbochainError(f"the GroupNormalization {norm.name} reads a tensor whose shape is not known")
    computed = ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype
    tape = ir.tape.Tape()
    ones, zeros = (_constant(tape, value(groups, computed.numpy())) for value in (np.ones, np.zeros))
    read = tape.op("Reshape", [x, _sizes(tape, sizes[0], groups, -1)])
    read = read if computed == dtype else tape.op("Cast", [read], {"to": computed})
    made = tape.op("InstanceNormalization", [read, ones, zeros], {"epsilon": norm.attributes["epsilon"].value})
    made = made if computed == dtype else tape.op("Cast", [made], {"to": dtype})
    made = tape.op("Reshape", [made, _sizes(tape, *sizes)])
    per_channel = _sizes(tape, sizes[1], *(1,) * (len(sizes) - 2))
    made = tape.op("Mul", [made, tape.op("Reshape", [weight, per_channel])])
    made = tape.op("Add", [made, tape.op("Reshape", [bias, per_channel])])
    ir.convenience.replace_nodes_and_values(graph, norm, [norm], tape.nodes, norm.outputs, [made])


def _sizes(tape: ir.tape.Tape, *values: int) -> ir.Value:
    return _constant(tape, np.array(values, np.int64))


def _constant(tape: ir.tape.Tape, values: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(values)})
