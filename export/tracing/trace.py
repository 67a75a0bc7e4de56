"""Trace the graphs of a component to ONNX."""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from turbochain.export import load
from turbochain.export.chains import Placed
from turbochain.export.families import GraphSpec, Shape
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import attention, control, group_norm, modules, weights
from turbochain.export.tracing.modules import TORCH_DTYPES, SDUNet, copy_modules
from turbochain.export.tracing.names import name_map
from turbochain.export.tracing.rescale import rescale
from turbochain.export.tracing.simplify import simplify
from turbochain.export.tracing.slots import ACTIVATED, Slotted
from turbochain.export.tracing.traced import Traced
from turbochain.export.tracing.weights import DataFiles, Parameters
from turbochain.runtime.bundle.manifest import Graph, Tensor
from turbochain.runtime.errors import TurbochainError

OPSET = 21  # the first whose attention TensorRT fuses in every graph
OPSET_BF16 = 22  # the first with bf16 convolutions


@dataclass(frozen=True)
class TraceOrder:
    """A graph to trace."""

    name: str
    graph: Placed
    remedy: Remedy  # the precision and the changes that it is made with

    @property
    def spec(self) -> GraphSpec:
        """Return the graph's specification."""
        return self.graph.spec

    @property
    def shape(self) -> Shape:
        """Return the shape that it is made for."""
        return self.graph.shape


Ends = dict[str, tuple[str, tuple[int, ...]]]
"""Input → dtype, shape."""

Columns = Mapping[str, tuple[int, ...]]
"""Column of the table → the shape of the input that it fills."""


def export_graphs(
    checkpoint: Checkpoint,
    component: str,
    wanted: Sequence[TraceOrder],
    columns: Columns,
    bundle: Path,
    opset: int = OPSET,
) -> dict[str, Graph]:
    """Trace graphs of one component ("": those without weights) into `bundle/graphs`; return the manifest's entries.

    Each graph has a precision of its own. The component is loaded once for all graphs that are made with the same
    changes, and freed before it is loaded for others. Files: graphs/NAME.onnx, graphs/NAME.names.json, and the data
    files, see `weights`. Raises TurbochainError if the exporter lost an input or changed a shape.
    """
    folder = bundle / "graphs"
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        precision: weights.shared(folder, component, precision) for precision in {w.remedy.precision for w in wanted}
    }
    graphs: dict[str, Graph] = {}
    for alike in _alike(wanted):
        model, factors = _load(checkpoint, component, alike[0].remedy)
        parameters = Parameters(model)
        for one in alike:
            inputs = {
                k: v or ("float32", _column(columns[k], one.shape.rows if k in checkpoint.family.columns else 0))
                for k, v in one.spec.inputs(checkpoint.configs, one.shape).items()
            }
            module = _module(one, model, inputs)
            if isinstance(module, Slotted):
                inputs |= {name: ("float32", (size,)) for name, size in module.sizes.items()}
            data = files[one.remedy.precision]
            graph = _trace(one, module, inputs, parameters, factors, data, bundle, opset)
            graphs[one.name] = replace(graph, model_class=type(model).__name__ if component else "")
        del model, parameters, module
        gc.collect()  # the exporter's objects refer to each other, and to the weights
    return {w.name: graphs[w.name] for w in wanted}


def _alike(wanted: Sequence[TraceOrder]) -> list[list[TraceOrder]]:
    """Return the graphs in groups that one loaded component serves, in the order of their first members."""
    groups: list[tuple[tuple[Any, ...], list[TraceOrder]]] = []
    for one in wanted:
        changes = (one.remedy.precision, one.remedy.exponents, one.remedy.attention)
        group = next((members for key, members in groups if key == changes), None)
        if group is None:
            groups.append((changes, group := []))
        group.append(one)
    return [members for _, members in groups]


def _module(wanted: TraceOrder, model: torch.nn.Module, inputs: Ends) -> Traced:
    """Return the module that is traced, on the weights of `model`; `inputs`: but for those of its slots."""
    spec, own = wanted.spec, copy_modules(model)
    traced = getattr(control if spec.module in vars(control) else modules, spec.module)
    module: Traced = traced(own, *spec.arguments(wanted.shape)).eval()
    projections = module.projections if isinstance(module, SDUNet) and ACTIVATED in inputs else {}
    if spec.reads:
        assert isinstance(module, modules.UNet)
        module = control.Controlled(module, [name for name in inputs if name != ACTIVATED]).eval()
    if wanted.remedy.precision == "fp32":  # in lower precision a GPU's own GroupNormalization is wanted
        group_norm.replace_group_norms(module)
    if spec.rank:
        examples = {name: _example(*end) for name, end in inputs.items()}
        return Slotted(module, own, spec.rank, examples, projections).eval()
    return module


def _load(checkpoint: Checkpoint, component: str, remedy: Remedy) -> tuple[torch.nn.Module, dict[str, float]]:
    """Return the component with its remedy, and parameter → the number that its values were multiplied by."""
    if not component:
        return torch.nn.Module(), {}
    # What overflows in fp16 may do so as a weight, so the weights are rescaled before they are rounded.
    dtype = TORCH_DTYPES[remedy.precision]
    model = load.component(checkpoint, component, torch.float32 if remedy.exponents else dtype, traceable=True)
    factors = rescale(model, remedy.exponents) if remedy.exponents else {}
    if factors:
        model.to(dtype)
    attention.upcast(model, remedy.attention)
    return model, factors


def _trace(
    wanted: TraceOrder,
    module: Traced,
    inputs: Ends,
    parameters: Parameters,
    factors: Mapping[str, float],
    files: DataFiles,
    bundle: Path,
    opset: int,
) -> Graph:
    """Write the files of one graph; `parameters` are those of its component, `factors` as `_load` returns them."""
    name, spec, precision = wanted.name, wanted.spec, wanted.remedy.precision
    opset = max(opset, OPSET_BF16) if precision == "bf16" else opset
    # Every example is a tensor of its own: two inputs that are one object would be merged silently.
    examples = tuple(_example(dtype, size) for dtype, size in inputs.values())
    program = torch.onnx.export(
        module,
        examples,
        dynamo=True,
        opset_version=opset,
        optimize=False,  # `simplify` does
        input_names=list(inputs),
        output_names=list(spec.outputs),
        verbose=False,
    )
    assert program is not None
    simplify(program.model)
    file, names = f"graphs/{name}.onnx", f"graphs/{name}.names.json"
    written = weights.write(program.model, bundle / "graphs", name, parameters, files)
    proto = ir.to_proto(program.model)
    del program
    _strip(proto)
    _argmax_of_floats(proto)
    (bundle / file).write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(bundle / file)
    found = name_map(parameters, written.initializers, module.folded, factors)
    (bundle / names).write_text(_lines(found))
    slots = f"graphs/{name}.slots.json" if isinstance(module, Slotted) else ""
    if isinstance(module, Slotted):
        (bundle / slots).write_text(module.text())
    return Graph(
        role=spec.role,
        component=spec.component,
        file=file,
        data=tuple(f"graphs/{data}" for data in written.data),
        names=names,
        precision=precision,
        opset=opset,
        inputs=_ends(name, proto.graph.input, inputs, proto),
        outputs=_ends(name, proto.graph.output, dict.fromkeys(spec.outputs), proto),
        remedy=wanted.remedy.phrase,
        size=(wanted.shape.height, wanted.shape.width) if spec.sized else (),
        batch=wanted.shape.batch,
        features=spec.features,
        slots=slots,
    )


def _lines(found: Mapping[str, Any]) -> str:
    """Return JSON with a line for each entry."""
    lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    return "{\n" + ",\n".join(lines) + "\n}\n" if found else "{}\n"


def _column(size: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Return the shape of an input that a table's column fills: with one row, or with all rows if it is a stream."""
    return (rows, *size[1:]) if rows else size


def _example(dtype: str, size: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(size) if dtype == "float32" else torch.ones(size, dtype=getattr(torch, dtype))


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
    """Return the graph's inputs or outputs as declared, after checking that the exporter kept them."""
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
