"""Write models with external data in every place that ONNX has for it, sound and hostile ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from turbochain.runtime.bundle.external_data import check_external, external_locations
from turbochain.runtime.errors import BundleError


def external(location: str, dims: tuple[int, ...] = (4,)) -> TensorProto:
    tensor = TensorProto(name=f"t_{location}", data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*initializers: TensorProto, nodes=(), functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    return helper.make_model(graph, functions=functions)


def branch(name: str, *nodes, tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [], initializer=[tensor])


def everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that can hold one, each with a location of its own."""
    inner = helper.make_node(
        "If",
        ["c"],
        ["o"],
        then_branch=branch("i", tensor=external("if2")),
        else_branch=helper.make_graph([], "e", [], []),
    )
    nodes = [
        helper.make_node(
            "If",
            ["c"],
            ["o"],
            then_branch=branch("t", inner, tensor=external("if1")),
            else_branch=branch("f", tensor=external("else")),
        ),
        helper.make_node("Constant", [], ["k"], value=external("constant"), doc_string="location"),
        helper.make_node("Many", [], ["k"], tensors=[external("tensors0"), external("tensors1")]),
        helper.make_node("Graphs", [], ["k"], graphs=[branch("x", tensor=external("graphs"))]),
    ]
    sparse = onnx.SparseTensorProto(values=external("values"), indices=external("indices"), dims=[9])
    nodes.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))
    nodes[-1].attribute.add(name="list", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.add(
        values=external("list values"), indices=external("list indices"), dims=[9]
    )
    function = helper.make_function(
        "d", "F", [], ["o"], [helper.make_node("Constant", [], ["o"], value=external("function"))], []
    )
    function.attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("default"))
    model = model_of(external("initializer"), external("folder/Ω.data"), nodes=nodes, functions=[function])
    model.graph.sparse_initializer.add(values=external("sparse v"), indices=external("sparse i"), dims=[9])
    model.graph.initializer.append(numpy_helper.from_array(np.arange(30, dtype=np.float32), "inline"))
    helper.set_model_props(model, {"location": "not a file", "k": "v"})
    training = model.training_info.add()
    training.algorithm.CopyFrom(branch("algorithm", tensor=external("algorithm")))
    training.initialization.CopyFrom(branch("start", tensor=external("start")))
    return model


def tensors(message) -> list[TensorProto]:
    """Every TensorProto below, by protobuf's own reflection."""
    if isinstance(message, TensorProto):
        return [message]
    found = []
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                found += tensors(child)
    return found


def locations(message) -> set[str]:
    return {entry.value for t in tensors(message) for entry in t.external_data if entry.key == "location"}


def refused(root, *allowed: str) -> str:
    with pytest.raises(BundleError) as caught:
        check_external(root, "graphs/m.onnx", allowed)
    return str(caught.value)


def write_bundle(folder: Path) -> Path:
    """Return a new folder in the shape of a bundle, with links that lead outside it."""
    root = folder / "bundle"
    (root / "graphs").mkdir(parents=True)
    (root / "graphs" / "w.data").write_bytes(bytes(16))
    (folder / "secret").write_bytes(bytes(16))
    (root / "graphs" / "out").symlink_to(folder / "secret")
    (root / "graphs" / "up").symlink_to(folder)
    return root


def found_in_folder(folder: Path, raw: bytes | onnx.ModelProto) -> set[str]:
    """Write a model into the folder, and return the files that it would open."""
    path = folder / "model.onnx"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.SerializeToString())
    return external_locations(path)
