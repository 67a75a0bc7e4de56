"""An ONNX graph that is rewritten node by node."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Step:
    """An operator in a row of them, which reads what the one before makes, and constants."""

    def __init__(self, kind: str, *constants: str, **attributes: Any) -> None:
        self.kind, self.constants, self.attributes = kind, constants, attributes


class Network:
    """A graph with fixed shapes: what is known of its tensors, and how its nodes are replaced."""

    def __init__(self, model: Any, folder: Path) -> None:
        """Infer every shape of `model` (onnx.ModelProto), which is changed; `folder`: where its external data is."""
        self.model, self.folder = model, folder
        self.initializers = {t.name: t for t in model.graph.initializer}
        self._types = _types(model)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that was there when this object was made, or of a constant."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        return tuple(d.dim_value for d in self._types[name].shape.dim)

    def dtype(self, name: str) -> int:
        """Return the type of the same tensors' elements, of onnx.TensorProto.DataType."""
        known = self.initializers.get(name)
        found: int = known.data_type if known else self._types[name].elem_type
        return found

    def value(self, name: str) -> np.ndarray | None:
        """Return the values of a constant, read from the bundle's data if they are there; None if it is none."""
        known = self.initializers.get(name)
        return None if known is None else numpy_helper.to_array(known, str(self.folder))

    def producer(self, name: str) -> Any:
        """Return the node that makes a tensor; None for an input or a constant."""
        return next((node for node in self.model.graph.node if name in node.output), None)

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant that the form itself holds; returns its name."""
        return self._add(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def sizes(self, *values: int) -> str:
        """Add a constant shape, or other whole numbers in a row (int64); returns its name."""
        return self.constant(f"sizes_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def reshaped(self, constant: str, shape: tuple[int, ...]) -> str:
        """Return the name of the same constant in another shape; its values stay where they are."""
        name = f"{constant}_as_{'_'.join(map(str, shape))}"
        if name not in self.initializers:
            assert math.prod(shape) == math.prod(self.shape(constant)), (constant, shape)
            copy = onnx.TensorProto()
            copy.CopyFrom(self.initializers[constant])
            copy.name, copy.dims[:] = name, shape
            self._add(copy)
        return name

    def _add(self, tensor: Any) -> str:
        if tensor.name not in self.initializers:
            self.model.graph.initializer.append(tensor)
            self.initializers[tensor.name] = tensor
        name: str = tensor.name
        return name

    def replace(self, kind: str, make: Callable[[Any], Iterable[Any] | None]) -> None:
        """Put what `make` returns of each node of a kind (such as "Concat") in its place; None: it stays.

        Nodes that nothing reads any more and constants without a reader go.
        """
        nodes: list[Any] = []
        for node in self.model.graph.node:
            made = make(node) if node.op_type == kind else None
            nodes += [node] if made is None else made
        self._keep(_alive(nodes, {o.name for o in self.model.graph.output}))

    def _keep(self, nodes: list[Any]) -> None:
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]  # deleted, the originals are void
        read = {name for node in copies for name in node.input} | {o.name for o in self.model.graph.output}
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        for tensor in [t for t in self.model.graph.initializer if t.name not in read]:
            self.model.graph.initializer.remove(tensor)
        self.initializers = {t.name: t for t in self.model.graph.initializer}


def chain(first: str, steps: Sequence[Step], last: str) -> Iterator[Any]:
    """Make the nodes of a row of steps, of which the first reads `first` and the last makes `last`."""
    read = first
    for number, step in enumerate(steps, 1):
        made = last if number == len(steps) else f"{last}_step_{number}"
        yield helper.make_node(step.kind, [read, *step.constants], [made], f"node_{made}", **step.attributes)
        read = made


def attributes(node: Any) -> Mapping[str, Any]:
    """Return the attributes of a node by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _alive(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """Return the nodes that the outputs `wanted` need, directly or not, in their order."""
    found = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def _types(model: Any) -> dict[str, Any]:
    """Return the type of every tensor of a graph, without its constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":  # onnx infers nothing of it; it makes what it reads
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    graph = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph
    return {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
