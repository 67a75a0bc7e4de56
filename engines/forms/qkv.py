"""An attention's queries, keys and values are made as one tensor, with one transposition instead of three."""

from collections import defaultdict
from dataclasses import dataclass

import onnx_ir as ir

from turbochain.engines.forms.shapes import shape

_HEADS_FIRST, _AND_TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)


@dataclass
class _Projection:
    """x · weight + bias, seen as heads."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value
    heads: tuple[int, ...]  # [B, S, H, D]
    transposed: bool  # whether the result is [B, H, D, S], not [B, H, S, D]
    result: ir.Value


def merge_qkv(model: ir.Model) -> int:
    """Merge, in the model itself, each three projections of one tensor that become heads; return how many.

    TensorRT merges the products by itself, but then adds each bias in a kernel of its own, which copies too. It keeps
    what is merged here because the parts are cut out of [3·B·H, S, D]: with these sizes apart it finds the three again.
    The weights and biases stay where they are, and are put together in the graph. A single head gains nothing.
    """
    read: dict[ir.Value, list[_Projection]] = defaultdict(list)
    for node in model.graph:
        if projection := _projection(node):
            read[projection.x].append(projection)
    threes = [found for found in read.values() if len(found) == 3 and len({p.heads for p in found}) == 1]
    for found in threes:
        _merge(model.graph, found)
    if threes:
        model.graph.sort()
    return len(threes)


def _projection(product: ir.Node) -> _Projection | None:
    """Return the projection whose product this node is, if it is one."""
    if product.op_type != "MatMul":
        return None
    chain = [product]
    for kind in ("Add", "Reshape", "Transpose"):
        uses = tuple(chain[-1].outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != kind or chain[-1].outputs[0].is_graph_output():
            return None
        chain.append(uses[0].node)
    _, add, reshape, transpose = chain
    bias = add.inputs[1 if add.inputs[0] is product.outputs[0] else 0]
    (x, weight), order = product.inputs, tuple(transpose.attributes["perm"].value)
    rows, heads = shape(product.outputs[0]), shape(reshape.outputs[0])
    if x is None or weight is None or bias is None or rows is None or heads is None:
        return None
    fits = len(heads) == 4 and len(rows) == 3 and heads[:2] == rows[:2] and heads[2] > 1 and shape(bias) == rows[2:]
    fits = fits and len(shape(weight) or ()) == 2 and order in (_HEADS_FIRST, _AND_TRANSPOSED)
    return _Projection(x, weight, bias, heads, order == _AND_TRANSPOSED, transpose.outputs[0]) if fits else None


def _merge(graph: ir.Graph, found: list[_Projection]) -> None:
    batch, length, heads, size = found[0].heads
    tape = ir.tape.Tape()

    def reshape(value: ir.Value, *sizes: int) -> ir.Value:
        return tape.op("Reshape", [value, tape.op("Constant", [], {"value_ints": sizes})])

    weight = tape.op("Concat", [p.weight for p in found], {"axis": 1})
    bias = tape.op("Concat", [p.bias for p in found], {"axis": 0})
    rows = tape.op("Add", [tape.op("MatMul", [found[0].x, weight]), bias])
    first = tape.op("Transpose", [reshape(rows, batch, length, 3, heads, size)], {"perm": [2, 0, 3, 1, 4]})
    flat = reshape(first, 3 * batch * heads, length, size)
    parts = tape.op_multi_out("Split", [flat], {"axis": 0, "num_outputs": 3}, num_outputs=3)
    for projection, part in zip(found, parts, strict=True):
        result = reshape(part, batch, heads, length, size)
        if projection.transposed:
            result = tape.op("Transpose", [result], {"perm": [0, 1, 3, 2]})
        projection.result.replace_all_uses_with(result)
    graph.extend(tape.nodes)
