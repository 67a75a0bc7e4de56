"""A GroupNormalization after a Reshape is computed before it: the same values, and TensorRT recognises the norm.

TensorRT makes four kernels over fp32 copies for a norm over [B, C, H·W], and a single kernel for one over [B, C, H, W].
"""

import onnx_ir as ir

from turbochain.engines.forms.shapes import maker, shape


def norm_first(model: ir.Model) -> int:
    """Exchange, in the model itself, each norm with the Reshape that it reads; return how many there were."""
    pairs = [(node, flatten) for node in model.graph if (flatten := _flattening(node))]
    for norm, flatten in pairs:
        (image, sizes), normed = flatten.inputs, norm.outputs[0]
        before = ir.node("GroupNormalization", [image, *norm.inputs[1:]], norm.attributes, name=norm.name)
        after = ir.node("Reshape", [before.outputs[0], sizes], flatten.attributes, name=f"{norm.name}.flat")
        ir.convenience.replace_nodes_and_values(
            model.graph, norm, [norm], [before, after], [normed], [after.outputs[0]]
        )
    return len(pairs)


def _flattening(norm: ir.Node) -> ir.Node | None:
    """Return the Reshape that a norm reads, if it keeps batch and channels apart."""
    if norm.op_type != "GroupNormalization" or (flatten := maker(norm.inputs[0], "Reshape")) is None:
        return None
    before, after = shape(flatten.inputs[0]), shape(norm.inputs[0])
    known = before is not None and after is not None and len(before) > 2 and before[:2] == after[:2]
    return flatten if known else None
