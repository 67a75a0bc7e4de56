"""Operators that make ONNX Runtime's CUDA provider copy sizes or addresses from page-locked memory in every run.

GatherND is one; in older releases a Concat of unequal parts was another. Both are replaced by operators that do not.
"""

import math

import onnx_ir as ir

from turbochain.engines.forms.shapes import maker, shape

MOST = 32
"""Tensors that the provider joins or splits with their addresses in the kernel's arguments."""


def gather_rows(model: ir.Model) -> int:
    """Take single rows, as SDXL's pooled one, out of [B·S, D] with Gather instead of GatherND; return how many times.

    A GatherND of [B, S, D] by pairs (b, s) is changed, in the model itself, where the pairs are two joined columns.
    """
    found = [node for node in model.graph if node.op_type == "GatherND" and _joins_columns(node)]
    for node in found:
        (data, pairs), tape = node.inputs, ir.tape.Tape()
        sizes, joined = shape(data), maker(pairs, "Concat")
        assert sizes is not None and joined is not None
        first, second = joined.inputs
        length = tape.op("Constant", [], {"value_int": sizes[1]})
        index = tape.op("Add", [tape.op("Mul", [first, length]), second])
        rows = tape.op("Reshape", [data, tape.op("Constant", [], {"value_ints": [-1, sizes[2]]})])
        flat = tape.op("Reshape", [index, tape.op("Constant", [], {"value_ints": [-1]})])
        made = tape.op("Gather", [rows, flat], {"axis": 0})
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [made])
    return len(found)


def _joins_columns(node: ir.Node) -> bool:
    rows, joined = shape(node.inputs[0]) or (), maker(node.inputs[1], "Concat")
    whole = node.attributes.get_int("batch_dims", 0) == 0 and len(rows) == 3
    return whole and joined is not None and [(shape(v) or ())[1:] for v in joined.inputs] == [(1,), (1,)]


def cut_concats(model: ir.Model) -> int:
    """Cut, in the model itself, what a Concat joins into pieces of one size; return how many were of unequal parts.

    One that would have more than `MOST` pieces is left as it is.
    """
    cut = 0
    for node in [node for node in model.graph if node.op_type == "Concat"]:
        axis, shapes = node.attributes["axis"].value, [shape(value) for value in node.inputs]
        sizes = [found[axis] for found in shapes if found is not None]
        if len(sizes) < len(shapes) or len({*sizes}) == 1 or sum(sizes) // math.gcd(*sizes) > MOST:
            continue
        counts, tape = [size // math.gcd(*sizes) for size in sizes], ir.tape.Tape()
        pieces: list[ir.Value | None] = []
        for value, count in zip(node.inputs, counts, strict=True):
            how = {"axis": axis, "num_outputs": count}
            pieces += [value] if count == 1 else tape.op_multi_out("Split", [value], how, num_outputs=count)
        made = tape.op("Concat", pieces, {"axis": axis})
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [made])
        cut += 1
    return cut
