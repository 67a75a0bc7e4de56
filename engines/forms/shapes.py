"""Read a graph with the shape of every value, which decides what is rewritten; the weights stay in their files."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from turbochain.runtime.errors import TurbochainError


def read(path: Path) -> ir.Model:
    """Return the model of an ONNX file, with shapes; its external data is read when a value of it is asked for.

    Raises TurbochainError if the file is no graph.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise TurbochainError(f"{path} is not an ONNX graph: {error}") from None
    inferred = _infer(proto).graph.value_info
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inferred)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def values(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the values of a tensor of a bundle's graph.

    In the hub's cache a bundle's data files are hard links. onnx_ir refuses to read those, unless a tensor has no
    base_dir. Here that is safe: the files were hashed, and lie inside the bundle.
    """
    if isinstance(tensor, ir.ExternalTensor):
        place, part = Path(tensor.path).absolute(), (tensor.offset, tensor.length, tensor.dtype)
        tensor = ir.ExternalTensor(place, *part, shape=tensor.shape, name=tensor.name)
    return tensor.numpy()


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with shapes. ONNX infers none behind a GroupNormalization, whose result has its input's."""
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    del plain.graph.value_info[:]
    for node in plain.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    return onnx.shape_inference.infer_shapes(plain, data_prop=True)


def shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape if all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())


def maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None
