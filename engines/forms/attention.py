"""An attention becomes one node: the MultiHeadAttention of ONNX Runtime's own operators (com.microsoft).

In a browser the scores of SD's largest attention are 168 MB in fp16. WebGPU has kernels for this operator that hold a
few rows of them at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from turbochain.engines.forms.shapes import maker, shape, values

DOMAIN = "com.microsoft"
TILE = 16
"""How many keys, and as many values, WebGPU's kernel holds at once."""
WORKGROUP_BYTES = 32 * 2**10
"""Bytes that it has room for on a usual GPU. A VAE's single head with 512 values is larger, even in fp16, and stays."""

_HEADS_FIRST, _AND_TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)


@dataclass
class _Attention:
    """softmax(scale · Q·Kᵀ)·V; Q is [B, S, heads·D], K [B, L, heads·D], V and the result likewise."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    heads: int
    scale: float
    result: ir.Node  # the last one, whose output has the heads side by side again


def fuse_attention(model: ir.Model) -> int:
    """Replace, in the model itself, every attention without a mask by one node; return how many.

    One whose heads are too large for WebGPU's kernel (see `WORKGROUP_BYTES`) stays.
    """
    found = [attention for node in model.graph if (attention := _attention(node))]
    for a in found:
        name = f"{a.result.name}.attention"
        fused = ir.node(
            "MultiHeadAttention", [a.q, a.k, a.v], {"num_heads": a.heads, "scale": a.scale}, domain=DOMAIN, name=name
        )
        old = a.result.outputs
        ir.convenience.replace_nodes_and_values(model.graph, a.result, [a.result], [fused], old, fused.outputs)
    if found:
        model.graph.opset_imports[DOMAIN] = 1
    return len(found)


def _attention(softmax: ir.Node) -> _Attention | None:
    """Return the attention whose softmax this node is, if it is one."""
    if softmax.op_type != "Softmax" or softmax.attributes["axis"].value not in (-1, 3):
        return None
    scores, factor = _unscaled(softmax.inputs[0])
    first, second = maker(scores, "MatMul"), _only_use(softmax.outputs[0])
    if first is None or second is None or second.op_type != "MatMul" or second.inputs[0] is not softmax.outputs[0]:
        return None
    (q, k), v = first.inputs, second.inputs[1]
    sizes, result = shape(v), _joined(second)
    if len(shape(scores) or ()) != 4 or sizes is None or len(sizes) != 4 or result is None:
        return None
    heads, orders = sizes[1], (_HEADS_FIRST, _AND_TRANSPOSED, _HEADS_FIRST)
    parts = [flat for value, order in zip((q, k, v), orders, strict=True) if (flat := _flat(value, order))]
    if len(parts) < 3:
        return None
    (flat_q, by_q), (flat_k, by_k), (flat_v, by_v) = parts
    size = shape(flat_q)[2] // heads  # type: ignore[index]
    if by_v != 1 or 2 * TILE * size * flat_q.dtype.itemsize >= WORKGROUP_BYTES:
        return None
    return _Attention(flat_q, flat_k, flat_v, heads, factor * by_q * by_k, result)


def _flat(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, float] | None:
    """Return the [B, N, heads·D] that a product's factor is a view of, and what it was multiplied by on the way.

    `order`: how the factor's axes lie in [B, N, heads, D].
    """
    sizes = shape(value)
    if sizes is None or len(sizes) != 4:
        return None
    split = tuple(sizes[order.index(axis)] for axis in range(4))
    flat, factor = (*split[:2], split[2] * split[3]), 1.0
    views: list[ir.Node] = []
    while value is not None:
        value, by = _unscaled(value)
        factor *= by
        if shape(value) == flat and _lies(views[::-1], flat, np.arange(math.prod(flat)).reshape(split), order):
            return value, factor
        view = value.producer()
        if view is None or view.op_type not in ("Reshape", "Transpose"):
            return None
        views.append(view)
        value = view.inputs[0]
    return None


def _joined(product: ir.Node) -> ir.Node | None:
    """Return the node that puts the heads [B, heads, S, D] of a product side by side, [B, S, heads·D]."""
    batch, heads, length, size = shape(product.outputs[0]) or (0, 0, 0, 0)
    views: list[ir.Node] = []
    split, joined = (batch, heads, length, size), (batch, length, heads * size)
    for view in _following_views(product.outputs[0]):
        views.append(view)
        made = np.arange(math.prod(split)).reshape(split).transpose(_HEADS_FIRST)
        if shape(view.outputs[0]) == joined and _lies(views, split, made.reshape(joined), range(3)):
            return view
    return None


def _following_views(value: ir.Value) -> Iterator[ir.Node]:
    """Find the Reshapes and Transposes of a value that nothing else reads, one after the other."""
    while (node := _only_use(value)) is not None and node.op_type in ("Reshape", "Transpose"):
        yield node
        value = node.outputs[0]


def _lies(views: list[ir.Node], before: tuple[int, ...], expected: np.ndarray, order: tuple[int, ...] | range) -> bool:
    """Return whether Reshapes and Transposes bring values, numbered in the shape `before`, into the order expected."""
    numbers = np.arange(expected.size).reshape(before)
    for view in views:
        if view.op_type == "Transpose":
            numbers = numbers.transpose(view.attributes["perm"].value)
        else:
            numbers = numbers.reshape(shape(view.outputs[0]))
    return np.array_equal(numbers, expected.transpose(tuple(order)))


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """Return a product's other factor and the number that it is multiplied by: 1 if it is no product with a
    constant."""
    assert value is not None
    factor = 1.0
    while (product := maker(value, "Mul")) is not None:
        numbers = [_number(operand) for operand in product.inputs]
        at = next((i for i, number in enumerate(numbers) if number is not None), None)
        if at is None:
            break
        value, factor = product.inputs[1 - at], factor * numbers[at]  # type: ignore[operator]
    return value, factor


def _number(value: ir.Value | None) -> float | None:
    """Return a constant's number, if it has just one."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return float(values(constant).reshape(())) if constant is not None and constant.size == 1 else None


def _only_use(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value, if only one does and the graph does not return the value."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
