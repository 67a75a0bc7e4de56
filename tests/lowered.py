"""Decompose the exporter's operators without a second trace, which takes nearly half of a miniature's export.

PyTorch's exporter traces every program again, for the few operators that ONNX has not. Here these are replaced in the
graph. The files are the same (`test_trace.py`), and builds in processes of their own do as PyTorch does.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # operator, arguments, keywords

traced_again = _fx_passes.decompose_with_registry


def _evaluated(x: Node, p: float, train: bool) -> Call:
    return (aten.dropout.default, (x, p, train), {}) if train else (aten.clone.default, (x,), {})


def _converted(x: Node, wanted: dict[str, Any]) -> Call | Node:
    value = x.meta["val"]
    changed = {key: to for key, to in wanted.items() if to is not None and to != getattr(value, key)}
    return (aten._to_copy.default, (x,), changed) if changed else x


def _contiguous(x: Node) -> Call | Node:
    copied = aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
    return x if x.meta["val"].is_contiguous() else copied


def _reshaped(x: Node, shape: list[int]) -> Call:
    value = x.meta["val"]
    if value.is_contiguous():
        return aten.view.default, (x, shape), {}
    try:  # a view has no -1 then
        shape = [*torch.empty_strided(value.shape, value.stride(), device="meta").view(shape).shape]
    except RuntimeError:  # it copies
        return aten.reshape.default, (x, shape), {}
    return aten.view.default, (x, shape), {}


def _in_parts(x: Node, chunks: int, dim: int = 0) -> Call:
    length = math.ceil(x.meta["val"].shape[dim] / chunks)
    return aten.split.Tensor, (x, length, *([dim] if dim else [])), {}


SAME: dict[Any, Callable[..., Call | Node]] = {
    aten.to.device: lambda x, device, dtype: _converted(x, {"device": device, "dtype": dtype}),
    aten.to.dtype: lambda x, dtype: _converted(x, {"dtype": dtype}),
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _evaluated,
    aten.reshape.default: _reshaped,
    aten.chunk.default: _in_parts,
}
"""Operators that a trace would replace → what it would replace them by."""


@functools.cache
def _replaced(registry: ONNXRegistry) -> frozenset[Any]:
    """Return the operators that a trace would replace."""
    kept = set(_decomp.get_onnx_implemented_overloads(registry))
    return frozenset(_decomp.create_onnx_friendly_decomposition_table(kept))


def _kept(node: Node, registry: ONNXRegistry) -> bool:
    """Return whether a trace would leave the node as it is."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op != "get_attr"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or target in _replaced(registry):
        return False
    return not _is_cia_op(target) or _is_preservable_cia_op(target)


def _rename_outputs(program: ExportedProgram, made: dict[Node, Node]) -> None:
    *_, output = made  # the last node
    for spec, value in zip(program.graph_signature.output_specs, made[output].args[0], strict=True):
        spec.arg.name = value.name


def decompose(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
    """Return the program with the operators that ONNX has. If it has others than `SAME` to replace, trace it again."""
    graph, made = torch.fx.Graph(), dict[Node, Node]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            made[node] = graph.node_copy(node, made.__getitem__)
            continue
        found: Call | Node = (node.target, node.args, node.kwargs)
        if node.target in SAME:
            found = SAME[node.target](*node.args, **node.kwargs)
        if isinstance(found, Node):
            made[node] = made[found]
            continue
        target, *given = found
        name = getattr(target, "overloadpacket", target).__name__  # as a trace names it
        made[node] = graph.create_node("call_function", target, *map_arg(tuple(given), made.__getitem__), name)
        made[node].meta = dict(node.meta)
    graph.eliminate_dead_code()
    renamed = any(new.name != node.name for node, new in made.items() if node.op == "placeholder")  # "input", say
    if renamed or not all(_kept(node, registry) for node in graph.nodes):
        return traced_again(program, registry)
    _rename_outputs(program, made)
    program.graph_module.graph = graph
    return program
