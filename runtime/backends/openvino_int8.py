"""Let layers of a graph that OpenVINO has read be computed in int8.

OpenVINO turns a FakeQuantize on both inputs of a convolution or of a matrix product into one in int8.
"""

import importlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from turbochain.runtime.backends import cpus
from turbochain.runtime.backends.openvino_model import ahead
from turbochain.runtime.bundle.quantization import LARGEST, LEVELS, Layer, Range

FEW_CHANNELS = 8
FEW_ROWS = 16
_UNBIASED = "/WithoutBiases"
"""What OpenVINO's reader adds to the name of a convolution whose bias it adds by another operator."""


def weight_bits() -> int:
    """Return how many bits a weight has here: 8, or 7 if sums of products of 8 bits would overflow."""
    return 8 if cpus.has_vnni() else 7


def layers(model: Any) -> dict[str, Any]:
    """Name in the ONNX graph → each convolution and linear layer that int8 suits.

    Those of few channels are left out, which read the latents or make the picture, and linear layers that read few
    rows, such as a time embedding: all of them are cheap. A layer whose weight is no constant is an adapter's.
    """
    return {_onnx_name(op): op for op in model.get_ordered_ops() if _suits(op)}


def _suits(op: Any) -> bool:
    kind = op.get_type_name()
    if kind not in ("Convolution", "MatMul") or _constant_of(op.input_value(1)) is None:
        return False
    weight = op.input_value(1).shape
    if kind == "Convolution":
        return min(weight[:2]) >= FEW_CHANNELS
    return min(weight) >= FEW_CHANNELS and prod(op.input_value(0).shape[:-1]) >= FEW_ROWS


def _onnx_name(op: Any) -> str:
    return str(op.get_friendly_name()).removesuffix(_UNBIASED)


def result(op: Any) -> Any:
    """Return the operator that makes what the ONNX node makes: a convolution's bias is added by another one."""
    return ahead(op, "Add") if op.get_friendly_name().endswith(_UNBIASED) else op


def quantize(model: Any, kept: Mapping[str, Layer], bits: int) -> int:
    """Let these of `layers` read int8: inputs by their ranges, weights of `bits` by output channel; return how many do.

    One that was rewritten into another operator, such as a convolution that also doubles the size, is left as it is.
    """
    found, read = layers(model), dict[tuple[str, int], Any]()
    for name in [name for name in found if name in kept]:
        op = found[name]
        value, weight = op.input_value(0), op.input_value(1)
        place = (value.get_node().get_friendly_name(), value.get_index())
        if place not in read:  # Q, K and V read one tensor
            read[place] = fake_quantize(value, kept[name].reads.range)
        op.input(0).replace_source_output(read[place])
        op.input(1).replace_source_output(round_weight(weight, op, bits))
    model.validate_nodes_and_infer_types()
    return sum(name in kept for name in found)


def fake_quantize(value: Any, seen: Range) -> Any:
    """Return a tensor rounded to the 256 levels of a range: zero is one of them, for borders are padded with it."""
    ops = importlib.import_module("openvino.opset13")
    dtype = value.get_element_type()
    ends = [ops.constant(seen.step * (level - seen.zero), dtype) for level in (0, LEVELS)]
    return ops.fake_quantize(value, *ends, *ends, LEVELS + 1).output(0)


def round_weight(weight: Any, op: Any, bits: int) -> Any:
    """Return a layer's weight rounded to int8, of which only `bits` are used.

    Each output channel has levels of its own, so that its largest value is the last that has so many bits.
    """
    ops = importlib.import_module("openvino.opset13")
    values, dtype = _constant_of(weight), weight.get_element_type()
    others = (1, 2, 3) if values.ndim == 4 else (1 if op.get_attributes().get("transpose_b") else 0,)
    last = 2 ** (bits - 1) - 1
    ends = np.abs(values).max(axis=others, keepdims=True).astype(np.float32) * (LARGEST / last)
    ends[ends == 0] = 1
    bounds = [ops.constant(sign * ends, dtype) for sign in (-1, 1)]
    return ops.fake_quantize(weight, *bounds, *bounds, 2 * LARGEST + 1).output(0)


def _constant_of(value: Any) -> Any:
    """Return the values that a constant, which may be converted and transposed, has here; None for other tensors."""
    node = value.get_node()
    if node.get_type_name() == "Transpose":
        inner, order = _constant_of(node.input_value(0)), _constant_of(node.input_value(1))
        return None if inner is None or order is None else inner.transpose(order)
    if node.get_type_name() == "Convert":
        return _constant_of(node.input_value(0))
    return node.data if node.get_type_name() == "Constant" else None
