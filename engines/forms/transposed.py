"""A doubling of the size and the 3x3 convolution after it become one transposed convolution."""

from dataclasses import dataclass

import onnx_ir as ir

from turbochain.engines.forms.shapes import maker, shape, values
from turbochain.runtime.backends.upsampling import transposed_kernel

_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_CONVOLUTION = {"group": 1, "strides": (1, 1), "dilations": (1, 1), "pads": (1, 1, 1, 1), "auto_pad": "NOTSET"}
_TRANSPOSED = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]}


@dataclass
class _Pair:
    small: ir.Value  # what is doubled
    convolution: ir.Node
    weight: ir.TensorProtocol  # [O, I, 3, 3]


def merge_upsampling(model: ir.Model) -> int:
    """Replace, in the model itself, each such pair by one node, see `transposed_kernel`; return how many.

    The kernels are new, and in the model. If the weights have less than fp32, the sums are rounded to theirs once.
    """
    pairs = [pair for node in model.graph if (pair := _pair(node))]
    for pair in pairs:
        old = pair.convolution
        kernel = transposed_kernel(values(pair.weight)).astype(pair.weight.dtype.numpy())
        weight = ir.val(f"{old.name}.transposed", const_value=ir.tensor(kernel))
        model.graph.register_initializer(weight)
        new = ir.node("ConvTranspose", [pair.small, weight, *old.inputs[2:]], _TRANSPOSED, name=old.name)
        ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], old.outputs, new.outputs)
    return len(pairs)


def _pair(convolution: ir.Node) -> _Pair | None:
    """Return a 3x3 convolution over all that Resize doubled, pixel by pixel, if this node is one."""
    if convolution.op_type != "Conv" or (resize := maker(convolution.inputs[0], "Resize")) is None:
        return None
    (small, *_), weight = resize.inputs, convolution.inputs[1]
    before, after = shape(small), shape(resize.outputs[0])
    if small is None or weight is None or weight.const_value is None or before is None:
        return None
    fits = (
        after == (*before[:2], *(2 * size for size in before[2:]))
        and (shape(weight) or ())[2:] == (3, 3)
        and all(_attribute(resize, name) == value for name, value in _NEAREST.items())
        and all(_attribute(convolution, name) == value for name, value in _CONVOLUTION.items())
    )
    return _Pair(small, convolution, weight.const_value) if fits else None


def _attribute(node: ir.Node, name: str) -> object:
    value = node.attributes[name].value if name in node.attributes else None
    return tuple(value) if isinstance(value, list) else value
