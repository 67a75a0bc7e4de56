"""What is changed in a graph that OpenVINO has read, before it compiles it."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FEW_CHANNELS = 8


def prepare(model: Any) -> None:
    """Change `model` itself with `fuse_group_norms` and `compare_integers`: it computes the same."""
    fuse_group_norms(model)
    compare_integers(model)
    model.validate_nodes_and_infer_types()


def fuse_group_norms(model: Any) -> int:
    """Put GroupNormalization in the place of what fp32 graphs hold as `export.stages.GroupNorm`; how many there were.

    There every sum is an operation of its own. OpenVINO would carry each out by itself, and in bf16; its own
    GroupNormalization is one pass over the data, with the sums in fp32.
    """
    return sum(_fuse(op) for op in model.get_ordered_ops() if op.get_type_name() == "Sqrt")


def compare_integers(model: Any) -> None:
    """Let TopK, which ArgMax becomes, read token ids as the integers that they are: bf16 has 8 bits of them."""
    for op in model.get_ops():
        read = op.input_value(0).get_node() if op.get_type_name() == "TopK" else None
        if read is not None and read.get_type_name() == "Convert":
            op.input(0).replace_source_output(read.input_value(0))


def has_as_many_heads_as_tokens(model: Any) -> bool:
    """Whether it transposes heads and tokens somewhere that are equally many."""
    transposes = (op for op in model.get_ops() if op.get_type_name() == "Transpose")
    orders = ((op.output(0).shape, op.input_value(1).get_node()) for op in transposes)
    return any(
        len(shape) == 4 and shape[1] == shape[2] > 1 and list(getattr(order, "data", ())) == [0, 2, 1, 3]
        for shape, order in orders
    )


def convolutions(model: Any) -> dict[str, Any]:
    """Name → each convolution that int8 suits: not those that read the latents or make the picture, which are cheap."""
    found = (op for op in model.get_ordered_ops() if op.get_type_name() == "Convolution")
    return {op.get_friendly_name(): op for op in found if min(op.input_value(1).shape[:2]) >= FEW_CHANNELS}


def quantize(model: Any, ranges: Mapping[str, Sequence[float]]) -> None:
    """Let every one of `convolutions` read int8: weights by output channel, the rest by its range [low, high].

    OpenVINO turns a FakeQuantize on both inputs of a convolution into one in int8. A range is widened to hold zero, and
    moved so that zero is one of its 256 levels: the borders are padded with it.
    """
    ops = importlib.import_module("openvino.opset13")
    for name, op in convolutions(model).items():
        low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
        step = (high - low) / 255 or 1.0
        ends = [np.float32(step * (level - round(-low / step))) for level in (0, 255)]
        weight = op.input_value(1)
        largest = np.abs(_values(weight)).max(axis=(1, 2, 3), keepdims=True).astype(np.float32)
        largest[largest == 0] = 1
        for i, (value, bounds, levels) in enumerate(
            ((op.input_value(0), ends, 256), (weight, (-largest, largest), 255))
        ):
            bounds = [ops.constant(bound) for bound in bounds]
            op.input(i).replace_source_output(ops.fake_quantize(value, *bounds, *bounds, levels).output(0))
    model.validate_nodes_and_infer_types()


def _values(output: Any) -> Any:
    """A constant's, also where it is stored in fp16 and converted."""
    node = output.get_node()
    return _values(node.input_value(0)) if node.get_type_name() == "Convert" else node.data


def _fuse(root: Any) -> bool:
    """The one whose standard deviation is `root`, if that is what it is."""
    rows = _back(root, "Add", "ReduceMean", "ReduceMean", "Multiply", "Subtract", "Reshape")
    scale = _ahead(root, "Divide", "Multiply")  # 1 / root, times the weight
    shift = _ahead(scale, "Multiply", "Subtract")  # the bias, less the mean times scale
    end = _ahead(shift, "Reshape", "Add")
    if rows is None or end is None:
        return False
    openvino = importlib.import_module("openvino")
    weight, bias = (_constant(node.input_value(i)) for node, i in ((scale, 1), (shift, 0)))
    epsilon = _constant(root.input_value(0).get_node().input_value(1))
    if weight is None or bias is None or epsilon is None:
        return False
    groups = int(rows.output(0).shape[1])
    ops = importlib.import_module("openvino.opset13")
    norm = ops.group_normalization(rows.input_value(0), weight.ravel(), bias.ravel(), groups, float(epsilon))
    norm.set_friendly_name(end.get_friendly_name())
    openvino.utils.replace_node(end, norm)
    return True


def _back(node: Any, *kinds: str) -> Any:
    """The node that first inputs lead back to over operations of these kinds, else None."""
    for kind in kinds:
        node = node.input_value(0).get_node()
        if node.get_type_name() != kind:
            return None
    return node


def _ahead(node: Any, *kinds: str) -> Any:
    """The node that consumers of these kinds lead on to, else None."""
    for kind in kinds:
        if node is None:
            return None
        consumers = (target.get_node() for target in node.output(0).get_target_inputs())
        node = next((consumer for consumer in consumers if consumer.get_type_name() == kind), None)
    return node


def _constant(value: Any) -> Any:
    node = value.get_node()
    return node.data if node.get_type_name() == "Constant" else None
