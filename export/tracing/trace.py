"""Tracing one stage to ONNX, and the map from parameters to initializers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from turbochain.export import load
from turbochain.export.families import Shape, Stage
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import attention, group_norm, modules
from turbochain.export.tracing.names import name_map
from turbochain.export.tracing.rescale import rescale
from turbochain.export.tracing.simplify import simplify
from turbochain.runtime.bundle.manifest import Graph, Tensor
from turbochain.runtime.errors import TurbochainError

OPSET = 21  # the first whose attention TensorRT fuses in every stage
OPSET_BF16 = 22  # the first with bf16 convolutions
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    checkpoint: Checkpoint,
    component: str,
    shape: Shape,
    remedies: Mapping[str, Remedy],
    bundle: Path,
    opset: int = OPSET,
) -> dict[str, Graph]:
    """Trace every stage of `component` into `bundle/graphs` and return what the manifest says of each.

    `remedies`: graph → the precision and the changes that it is made with. Files: graphs/NAME.onnx,
    graphs/NAME.onnx.data, graphs/NAME.names.json. Raises TurbochainError where the exporter lost an input or
    changed a shape.
    """
    traced = {name: stage for name, stage in checkpoint.family.stages.items() if stage.component == component}
    model, factors = _load(checkpoint, component, [remedies[n] for n, s in traced.items() if s.precision is None])
    parameters = dict(model.named_parameters())  # before a stage puts something in the place of a part
    graphs: dict[str, Graph] = {}
    for name, stage in traced.items():
        made = {t.name: (t.dtype, t.shape) for graph in graphs.values() for t in graph.outputs}
        inputs = {k: v or made[k] for k, v in stage.inputs(checkpoint.configs, shape).items()}
        module = getattr(modules, stage.module)(model, *stage.arguments(shape)).eval()
        if remedies[name].precision == "fp32":  # in lower precision a GPU's own GroupNormalization is wanted
            group_norm.replace_group_norms(module)
        graph = _trace(name, stage, module, inputs, parameters, factors, remedies[name], bundle, opset)
        graphs[name] = replace(graph, model_class=type(model).__name__)
    return graphs


def _load(checkpoint: Checkpoint, component: str, remedies: list[Remedy]) -> tuple[torch.nn.Module, dict[str, float]]:
    """The component with the remedies of its graphs, and parameter → what its values were multiplied by."""
    (precision,) = {r.precision for r in remedies}
    exponents = {module: e for r in remedies for module, e in r.exponents.items()}
    # What overflows in fp16 may do so as a weight, so the weights are rescaled before they are rounded.
    dtype = TORCH_DTYPES[precision]
    model = load.component(checkpoint, component, torch.float32 if exponents else dtype, traceable=True)
    factors = rescale(model, exponents) if exponents else {}
    if factors:
        model.to(dtype)
    attention.upcast(model, {name for r in remedies for name in r.attention})
    return model, factors


def _trace(
    name: str,
    stage: Stage,
    module: torch.nn.Module,
    inputs: dict[str, tuple[str, tuple[int, ...]]],
    parameters: Mapping[str, torch.Tensor],
    factors: Mapping[str, float],
    remedy: Remedy,
    bundle: Path,
    opset: int,
) -> Graph:
    """Write the three files of one stage; `parameters` are those of its component, `factors` as `_load` gives them."""
    opset = max(opset, OPSET_BF16) if remedy.precision == "bf16" else opset
    # Every example is a tensor of its own: two inputs that are one object would be merged silently.
    examples = tuple(_example(dtype, size) for dtype, size in inputs.values())
    program = torch.onnx.export(
        module,
        examples,
        dynamo=True,
        opset_version=opset,
        optimize=False,  # `simplify` does
        input_names=list(inputs),
        output_names=list(stage.outputs),
        verbose=False,
    )
    assert program is not None
    simplify(program.model)
    file = f"graphs/{name}.onnx"
    path = bundle / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    program.save(str(path), external_data=True)
    del program
    proto = onnx.load(str(path), load_external_data=False)
    _strip(proto)
    _argmax_of_floats(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))
    names = f"graphs/{name}.names.json"
    found = name_map(parameters, path, TORCH_DTYPES[remedy.precision], getattr(module, "folded", ()), factors)
    (bundle / names).write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    return Graph(
        role=stage.role,
        component=stage.component,
        file=file,
        data=(f"{file}.data",),
        names=names,
        precision=remedy.precision,
        opset=opset,
        inputs=_ends(name, proto.graph.input, inputs, proto),
        outputs=_ends(name, proto.graph.output, dict.fromkeys(stage.outputs), proto),
        remedy=remedy.phrase,
    )


def _example(dtype: str, size: tuple[int, ...]) -> torch.Tensor:
    return torch.ones(size, dtype=torch.int32) if dtype == "int32" else torch.randn(size)


def _strip(proto: Any) -> None:
    """Remove what the exporter adds about itself: local paths, most of the file, and unstable hashes."""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    proto.doc_string = proto.graph.doc_string = ""
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


def _argmax_of_floats(proto: Any) -> None:
    """Let ArgMax read token ids (below 2²⁴, so exact) as fp32: ONNX Runtime's CUDA provider takes no integers there."""
    casts = {node.output[0]: node for node in proto.graph.node if node.op_type == "Cast"}
    for argmax in (node for node in proto.graph.node if node.op_type == "ArgMax"):
        cast = casts.get(argmax.input[0])
        readers = [node for node in proto.graph.node if argmax.input[0] in node.input]
        if cast and readers == [argmax]:
            cast.attribute[0].i = onnx.TensorProto.FLOAT


def _ends(name: str, values: Any, expected: dict[str, Any], proto: Any) -> tuple[Tensor, ...]:
    """The graph's inputs or outputs as declared, after checking that the exporter kept them."""
    read = {i for node in proto.graph.node for i in node.input} | {o.name for o in proto.graph.output}
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found[value.name] = Tensor(value.name, dtype, tuple(d.dim_value for d in tensor.shape.dim))
    for key, wanted in expected.items():
        if key not in found or (wanted and (found[key].dtype, found[key].shape) != wanted):
            raise TurbochainError(f"the exporter changed {key} of {name}: wanted {wanted}, got {found.get(key)}")
        if wanted and key not in read:
            raise TurbochainError(f"the exporter lost every consumer of the input {key} of {name}")
    return tuple(found[key] for key in expected)
