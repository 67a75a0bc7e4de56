"""What ONNX Runtime's CUDA provider has no kernel for in bf16 is computed in fp32."""

import onnx_ir as ir

_WITHOUT = ("Resize",)


def widen(model: ir.Model) -> int:
    """Put casts around every such operator on bf16, in the model itself; return how many there were.

    fp32 holds every value of bf16, so a Resize to nearest neighbours stays exact.
    """
    found = [n for n in model.graph if n.op_type in _WITHOUT and n.inputs[0].dtype == ir.DataType.BFLOAT16]
    for node in found:
        tape = ir.tape.Tape()
        wide = tape.op("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
        made = tape.op(node.op_type, [wide, *node.inputs[1:]], node.attributes)
        made = tape.op("Cast", [made], {"to": ir.DataType.BFLOAT16})
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [made])
    return len(found)
