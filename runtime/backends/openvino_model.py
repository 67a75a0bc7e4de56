"""Rewrite a graph that OpenVINO has read, before OpenVINO compiles it."""

import importlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from turbochain.runtime.backends.upsampling import transposed_kernel

MANY_ROWS = 32


def fuse_group_norms(model: Any) -> int:
    """Fuse what fp32 graphs hold as `export.tracing.group_norm.GroupNorm` into GroupNormalization; return how many.

    There every sum is an operation of its own, and in bf16 each would be rounded; see `split_group_norms`.
    """
    return sum(_fuse(op) for op in model.get_ordered_ops() if op.get_type_name() == "Sqrt")


def split_group_norms(model: Any) -> int:
    """Compute each GroupNormalization of [B, C, H, W] with `MANY_ROWS` from sums over rows; return how many.

    OpenVINO's own wants each channel's values side by side, convolutions want each pixel's: between the two lay a
    reordering before it and one after it, a seventh of the VAE decoder's time. Sums over rows take either. In bf16 a
    sum over rows has 8 bits. So a group's mean is taken twice, the second time over the rows' distances from the first
    mean, and the variance over the distances of the rows' squares from its square: the roundings of many rows cancel.
    Those of few rows do not, and there the reordering is cheap.
    """
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "GroupNormalization"]
    shapes = [list(op.input_value(0).get_shape()) for op in found]
    found = [op for op, shape in zip(found, shapes, strict=True) if len(shape) == 4 and shape[2] >= MANY_ROWS]
    for op in found:
        _replace(op, _group_norm(op))
    return len(found)


def _group_norm(op: Any) -> Any:
    """Return the result of a GroupNormalization [B, C, H, W]."""
    ops = importlib.import_module("openvino.opset13")
    x, attributes = op.input_value(0), op.get_attributes()
    batch, channels, height, width = x.get_shape()
    groups = attributes["num_groups"]
    rows = [batch, groups, channels // groups * height]

    def number(value: float) -> Any:
        return ops.constant(value, x.get_element_type())

    def by_row(reduce: Any) -> Any:
        return ops.reshape(reduce(x, [3], True), rows, False)

    def mean(value: Any) -> Any:
        return ops.reduce_mean(value, [2], True)

    def per_channel(value: Any) -> Any:
        each = ops.broadcast(ops.unsqueeze(value, [3]), [batch, groups, channels // groups, 1])
        return ops.reshape(each, [batch, channels, 1, 1], False)

    means, norms = by_row(ops.reduce_mean), by_row(ops.reduce_l2)
    first = mean(means)
    second = mean(ops.subtract(means, first))
    squares = mean(ops.subtract(ops.multiply(ops.multiply(norms, norms), number(1 / width)), first * first))
    variance = ops.relu(ops.subtract(squares, ops.multiply(second, first + first + second)))
    inverse = ops.divide(number(1), ops.sqrt(ops.add(variance, number(attributes["epsilon"]))))
    weight, bias = (ops.unsqueeze(op.input_value(i), [0, 2, 3]) for i in (1, 2))
    centred = ops.subtract(ops.subtract(x, per_channel(first)), per_channel(second))
    return ops.add(ops.multiply(centred, ops.multiply(per_channel(inverse), weight)), bias)


def merge_upsampling(model: Any) -> int:
    """Replace a doubling of the size and the 3x3 convolution after it by a transposed convolution; return how many.

    See `transposed_kernel`. Convolutions with more weights than results are left alone: it saves little there, and the
    larger kernel takes memory.
    """
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution" and _reads_doubled(op)]
    ops = importlib.import_module("openvino.opset13")
    for op in found:
        small, weight = op.input_value(0).get_node().input_value(0), _values(op.input_value(1))
        kernel = ops.constant(transposed_kernel(weight), small.get_element_type())
        _replace(op, ops.convolution_backprop_data(small, kernel, [2, 2], None, [1, 1], [1, 1], [1, 1]))
    return len(found)


def _reads_doubled(convolution: Any) -> bool:
    """Return whether it is a 3x3 convolution over all that Interpolate doubled, pixel by pixel."""
    resize, attributes = convolution.input_value(0).get_node(), convolution.get_attributes()
    if resize.get_type_name() != "Interpolate":
        return False
    how, small, weight = resize.get_attributes(), resize.input_value(0).get_shape(), convolution.input_value(1)
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    plain = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
    return (
        all(how.get(name) == value for name, value in nearest.items())
        and all(list(attributes[name]) == value for name, value in plain.items())
        and list(resize.output(0).shape) == [*small[:2], 2 * small[2], 2 * small[3]]
        and list(weight.shape)[2:] == [3, 3]
        and prod(weight.shape) < prod(convolution.output(0).shape)
    )


def _replace(old: Any, new: Any) -> None:
    new.set_friendly_name(old.get_friendly_name())
    importlib.import_module("openvino").utils.replace_node(old, new)


def compare_integers(model: Any) -> None:
    """Let TopK, which ArgMax becomes, read token ids as integers: bf16 keeps only 8 bits of them."""
    for op in model.get_ops():
        read = op.input_value(0).get_node() if op.get_type_name() == "TopK" else None
        if read is not None and read.get_type_name() == "Convert":
            op.input(0).replace_source_output(read.input_value(0))


REWRITES = (fuse_group_norms, split_group_norms, merge_upsampling, compare_integers)


def prepare(model: Any, rewrites: Sequence[Callable[[Any], object]] = REWRITES) -> None:
    """Change `model` itself with `rewrites`: it computes the same, and takes less time."""
    for rewrite in rewrites:
        rewrite(model)
    model.validate_nodes_and_infer_types()


def has_as_many_heads_as_tokens(model: Any) -> bool:
    """Return whether it transposes equally many heads and tokens somewhere."""
    transposes = (op for op in model.get_ops() if op.get_type_name() == "Transpose")
    orders = ((op.output(0).shape, op.input_value(1).get_node()) for op in transposes)
    return any(
        len(shape) == 4 and shape[1] == shape[2] > 1 and list(getattr(order, "data", ())) == [0, 2, 1, 3]
        for shape, order in orders
    )


def _values(output: Any) -> Any:
    """Return a constant's values, also if it is stored in fp16 and converted."""
    node = output.get_node()
    return _values(node.input_value(0)) if node.get_type_name() == "Convert" else node.data


def _fuse(root: Any) -> bool:
    """Fuse the norm whose standard deviation is `root`; return whether it is one."""
    rows = _back(root, "Add", *["ReduceMean"] * 3, "Multiply", "Subtract", "Reshape")
    scale = ahead(root, "Divide", "Multiply")  # 1 / root, times the weight
    shift = ahead(scale, "Multiply", "Subtract")  # the bias, less the mean times scale
    end = ahead(shift, "Reshape", "Add")
    if rows is None or end is None:
        return False
    weight, bias = (_constant(node.input_value(i)) for node, i in ((scale, 1), (shift, 0)))
    epsilon = _constant(root.input_value(0).get_node().input_value(1))
    if weight is None or bias is None or epsilon is None:
        return False
    groups = int(rows.output(0).shape[1])
    ops = importlib.import_module("openvino.opset13")
    norm = ops.group_normalization(rows.input_value(0), weight.ravel(), bias.ravel(), groups, float(epsilon))
    _replace(end, norm)
    return True


def _back(node: Any, *kinds: str) -> Any:
    """Return the node that first inputs lead back to over operations of these kinds, or None."""
    for kind in kinds:
        node = node.input_value(0).get_node()
        if node.get_type_name() != kind:
            return None
    return node


def ahead(node: Any, *kinds: str) -> Any:
    """Return the node that consumers of these kinds lead on to, or None."""
    for kind in kinds:
        if node is None:
            return None
        consumers = (target.get_node() for target in node.output(0).get_target_inputs())
        node = next((consumer for consumer in consumers if consumer.get_type_name() == kind), None)
    return node


def _constant(value: Any) -> Any:
    node = value.get_node()
    return node.data if node.get_type_name() == "Constant" else None
