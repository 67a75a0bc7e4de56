"""What export writes: the graphs, the map from parameters to initializers, and diffusers' reference."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import image_graphs
import lowered
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import FAMILIES, SIZE, BundleFactory, in_each_precision
from diffusers import DiffusionPipeline
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file
from torch.onnx._internal.exporter import _fx_passes

from turbochain.export.families import Shape
from turbochain.export.sources.checkpoint import open_folder
from turbochain.export.tables import columns
from turbochain.export.tracing import group_norm
from turbochain.runtime import Bundle
from turbochain.runtime.bundle.hashing import digest

COMPONENTS = {  # graph → the checkpoint's folder
    "sd": {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"},
    "sdxl": {
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder_2",
        "unet": "unet",
        "vae_decoder": "vae",
        "vae_encoder": "vae",
    },
}
ARITHMETIC = ("step", "step+guidance", "start")  # graphs without weights
TIME = {"sd": "time_projections", "sdxl": "time_embeds"}  # the column that depends on the timestep
TABLES = "tables/text-to-image.safetensors"
GRAPHS = [(family, name) for family in FAMILIES for name in COMPONENTS[family]]
AROUND = [(family, name) for family in FAMILIES for name in ARITHMETIC]
every_graph = pytest.mark.parametrize(("family", "name"), [*GRAPHS, *AROUND])
every_graph_with_weights = pytest.mark.parametrize(("family", "name"), GRAPHS)
every_family = pytest.mark.parametrize(("family", "precision"), in_each_precision((family,) for family in FAMILIES))


@pytest.fixture
def bundle(bundle_of: BundleFactory, family: str, precision: str = "fp32") -> Bundle:
    return Bundle.open(bundle_of(family, precision))


def read(bundle: Bundle, name: str) -> Any:
    return onnx.load(bundle.path / "graphs" / f"{name}.onnx", load_external_data=False)


def ends(values: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of a graph's inputs or outputs; a dimension that is not fixed is 0."""
    return [
        (
            v.name,
            onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
        )
        for v in values
    ]


@pytest.mark.parametrize(("family", "name", "precision"), in_each_precision([*GRAPHS, *AROUND]))
def test_graphs_are_valid_and_as_the_manifest_says(
    bundle_of: BundleFactory, family: str, name: str, precision: str
) -> None:
    bundle = Bundle.open(bundle_of(family, precision))
    graph, proto = bundle.manifest.graphs[name], read(bundle, name)
    onnx.checker.check_model(bundle.path / graph.file, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21}
    assert graph.opset == 21
    for declared, found in ((graph.inputs, proto.graph.input), (graph.outputs, proto.graph.output)):
        assert ends(found) == [(t.name, t.dtype, t.shape) for t in declared]
        assert all(size > 0 for _, _, shape in ends(found) for size in shape)
    assert {t.dtype for t in (*graph.inputs, *graph.outputs)} <= {"float32", "int32", "uint8"}
    read_somewhere = {i for node in proto.graph.node for i in node.input}
    assert {t.name for t in graph.inputs} <= read_somewhere


@every_graph
def test_no_graph_holds_a_sine(bundle: Bundle, name: str) -> None:
    operators = {node.op_type for node in read(bundle, name).graph.node}
    assert operators & ({"Mul", "Add"} if name in ARITHMETIC else {"MatMul", "Gemm", "Conv"})
    assert not operators & {"Sin", "Cos", "RandomNormal", "RandomNormalLike", "If", "Loop", "SplitToSequence"}


@every_family
def test_uint8_is_made_by_the_decoders_last_node_alone(bundle_of: BundleFactory, family: str, precision: str) -> None:
    graph = read(Bundle.open(bundle_of(family, precision)), "vae_decoder").graph
    casts = [node for node in graph.node if node.op_type == "Cast" and node.attribute[0].i == TensorProto.UINT8]
    assert casts == [graph.node[-1]]
    assert list(casts[0].output) == ["image"]
    assert TensorProto.UINT8 not in {t.data_type for t in graph.initializer}
    assert "QuantizeLinear" not in {node.op_type for node in graph.node}


@every_graph
def test_graphs_hold_no_trace_of_the_machine(bundle: Bundle, name: str) -> None:
    proto = read(bundle, name)
    raw = (bundle.path / "graphs" / f"{name}.onnx").read_bytes()
    secrets = rb"site-packages|/home|/root|/tmp|/work|\.py\b|Traceback|line \d+|" + re.escape(str(Path.cwd()).encode())
    assert re.search(secrets, raw) is None
    assert not proto.metadata_props and not proto.graph.metadata_props and not proto.doc_string
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_was_looked_at(bundle: Bundle, family: str) -> None:
    assert {*bundle.manifest.graphs} == {*COMPONENTS[family], *ARITHMETIC}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_around_the_unet_have_no_weights(bundle: Bundle, name: str) -> None:
    graph = bundle.manifest.graphs[name]
    assert (graph.component, graph.model_class, graph.data, graph.precision) == ("", "", (), "fp32")
    assert json.loads((bundle.path / graph.names).read_text()) == {}
    assert (bundle.path / graph.file).stat().st_size < 2**12


@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_step_is_a_row_of_a_linear_system(checkpoints: dict[str, Path], tmp_path: Path, K: int) -> None:
    """Against numpy in fp64, by onnx's own evaluator."""
    checkpoint, shape = open_folder(checkpoints["sd"], None), Shape(SIZE[1], SIZE[0], 2, K)
    graph = image_graphs.traced(checkpoint, image_graphs.own(checkpoint, "step", K), shape, tmp_path)["step"]
    random = np.random.default_rng(0)
    feeds = {t.name: random.standard_normal(t.shape).astype(t.dtype) for t in graph.inputs}
    made = ReferenceEvaluator(onnx.load(tmp_path / graph.file)).run([t.name for t in graph.outputs], feeds)
    state = np.stack([feeds["latents"], *feeds.get("history", ())]).astype(np.float64)
    expected = np.tensordot(feeds["m"].astype(np.float64), state, 1)
    for coefficient, tensor in (("v", "prediction"), ("w", "noise")):
        expected += np.multiply.outer(feeds[coefficient], feeds[tensor].astype(np.float64))
    assert [t.name for t in graph.outputs] == ["next_latents", "next_history"][: min(K, 2)]
    np.testing.assert_allclose(made[0], expected[0], atol=1e-5)
    if K > 1:
        np.testing.assert_allclose(made[1], expected[1:], atol=1e-5)


@every_graph_with_weights
def test_the_manifest_lists_the_data_files_that_a_graph_reads(bundle: Bundle, family: str, name: str) -> None:
    proto = read(bundle, name)
    external = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert external
    locations = {e.value for t in external for e in t.external_data if e.key == "location"}
    # Masks and the Linear that absorbed a constant are no parameters: a graph that has one has a file of its own.
    own = {f"{name}.onnx.data"} if "text" in name or (family, name) == ("sdxl", "unet") else set()
    assert locations == {f"{COMPONENTS[family][name]}.fp32-0.data"} | own
    data = bundle.manifest.graphs[name].data
    assert len(data) == len(locations) and set(data) == {f"graphs/{location}" for location in locations}


def checkpoint_weights(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def in_the_table(family: str, parameter: str) -> bool:
    """What is there of the UNet, or a part of it."""
    of_family = {"sd": ".time_emb_proj.", "sdxl": "add_embedding.linear_1."}[family]
    return parameter.startswith("time_embedding.") or of_family in parameter


def unused(family: str, name: str, parameter: str) -> bool:
    """What the graph has no use for: what follows `hidden_states[-2]`, the VAE's other half."""
    if COMPONENTS[family][name] == "vae":
        return parameter.startswith(("encoder.", "quant_conv.")) == (name == "vae_decoder")
    # The miniature's first SDXL encoder has two layers, and nothing reads its pooled output.
    return (family, name) == ("sdxl", "text_encoder") and ("layers.1." in parameter or "final_layer_norm" in parameter)


@pytest.mark.parametrize(("family", "name", "precision"), in_each_precision(GRAPHS))
def test_name_map_leads_every_parameter_to_its_values(
    bundle_of: BundleFactory, checkpoints: dict[str, Path], family: str, name: str, precision: str
) -> None:
    bundle = Bundle.open(bundle_of(family, precision))
    graph = bundle.manifest.graphs[name]
    weights = checkpoint_weights(checkpoints[family] / COMPONENTS[family][name])
    names = json.loads((bundle.path / graph.names).read_text())
    prefix = "" if set(names) <= set(weights) else "text_model."  # transformers 5 drops it when it loads
    assert {prefix + parameter for parameter in names} == {w for w in weights if not w.endswith("position_ids")}

    proto = read(bundle, name)
    load_external_data_for_model(proto, str(bundle.path / "graphs"))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    dtype = {"fp32": np.float32, "fp16": np.float16}[graph.precision]
    mapped: dict[str, list[str]] = defaultdict(list)
    for parameter, place in names.items():
        assert tuple(place["shape"]) == weights[prefix + parameter].shape
        assert (place.keys() == {"shape"}) == unused(family, name, parameter), parameter
        folded = name == "unet" and in_the_table(family, parameter)
        assert (place.get("folded") is True) == folded == (place.keys() == {"shape", "folded"}), parameter
        if "initializer" not in place:
            continue
        expected = weights[prefix + parameter].astype(dtype)
        found = held[place["initializer"]]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.reshape(expected.shape), expected, err_msg=parameter)
        mapped[place["initializer"]].append(parameter)
    assert all(len(parameters) == 1 for parameters in mapped.values())
    consumed = {i for node in proto.graph.node for i in node.input}
    assert set(mapped) <= consumed
    if "text" in name:
        assert any(p.endswith("position_embedding.weight") for (p,) in mapped.values())


NO_WORK = {"Slice", "Split", "Unsqueeze", "Reshape", "Cast", "Identity"}


@every_family
def test_a_step_computes_nothing_of_the_time_alone(bundle_of: BundleFactory, family: str, precision: str) -> None:
    graph = read(Bundle.open(bundle_of(family, precision)), "unet").graph
    constants = {t.name for t in graph.initializer} | {
        o for n in graph.node if n.op_type == "Constant" for o in n.output
    }
    table = {"timestep_embedding", "time_projections", "time_embeds", "time_ids_embeds"} & {i.name for i in graph.input}
    assert table == {TIME[family], *(["time_ids_embeds"] if family == "sdxl" else [])}
    found = set()
    for node in graph.node:  # in topological order
        read_here = {name for name in node.input if name} - constants
        if read_here and read_here <= table:
            table |= set(node.output)
            found.add(node.op_type)
        assert not read_here & table or node.op_type in {*NO_WORK, "Add"}  # it is added to what depends on more
    assert found <= NO_WORK
    names = {t.name for t in graph.initializer}
    assert not any("time_embedding." in name for name in names)
    assert any(".time_emb_proj." in name for name in names) == (family == "sdxl")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_joins_constants_to_what_it_reads(bundle: Bundle, family: str) -> None:
    """The time ids' embedding was one: it is a column of the table, with the Linear that read it."""
    graph = read(bundle, "unet").graph
    constants = {t.name for t in graph.initializer}
    joins = [node for node in graph.node if node.op_type == "Concat"]
    assert joins and not any(constants & set(node.input) for node in joins)


def watched_run(checkpoint: Path, suffix: str) -> tuple[Any, dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """A run of four steps: what each module of the UNet with this suffix read and made, in the modules' order."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    watched = {name: module for name, module in pipe.unet.named_modules() if name.endswith(suffix)}
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in watched}
    for name, module in watched.items():
        module.register_forward_hook(lambda _, given, made, name=name: seen[name].append((given[0], made)))
    pipe("a cat", num_inference_steps=4, height=SIZE[1], width=SIZE[0], guidance_scale=0, output_type="latent")
    return pipe, seen


def assert_rounded(made: np.ndarray, expected: np.ndarray) -> None:
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("family", "precision"), [("sd", "fp32"), ("sd", "fp16"), ("sdxl", "fp32")])
def test_a_column_of_the_time_is_what_diffusers_modules_make(
    bundle_of: BundleFactory, checkpoints: dict[str, Path], family: str, precision: str
) -> None:
    """In fp32 whatever the UNet is in, against hooks on a run of the pipeline."""
    chain = Bundle.open(bundle_of(family, precision)).open_chain()
    _, seen = watched_run(checkpoints[family], {"sd": "time_emb_proj", "sdxl": "time_embedding"}[family])
    assert len(seen) == (8 if family == "sd" else 1)
    rows = [torch.cat([made for _, made in row], dim=-1)[:1] for row in zip(*seen.values(), strict=True)]
    columns, tensor = chain.columns(chain.find(4)), chain.tensors[TIME[family]]
    assert columns[TIME[family]].shape == (4, *tensor.shape)
    assert_rounded(columns[TIME[family]], torch.stack(rows).numpy())
    if family == "sd":  # what an adapter of those projections is applied to
        table, arrays = chain.tables[chain.find(4)], load_file(chain.bundle.path / TABLES)
        read = torch.cat([given for given, _ in next(iter(seen.values()))]).numpy()
        assert_rounded(arrays["columns/activated_time_embedding"][table.index][:, 0], read)


def test_the_time_ids_are_their_part_of_the_linear_that_reads_them(
    bundle_of: BundleFactory, checkpoints: dict[str, Path]
) -> None:
    chain = Bundle.open(bundle_of("sdxl")).open_chain()
    pipe, seen = watched_run(checkpoints["sdxl"], "add_embedding.linear_1")
    (calls,) = seen.values()
    pooled = chain.tensors["pooled_prompt_embeds"].shape[-1]
    weight = pipe.unet.add_embedding.linear_1.weight[:, :pooled]
    for given, made in calls:
        expected = (made - given[:, :pooled] @ weight.T).detach().numpy()
        assert_rounded(chain.columns(chain.find(4))["time_ids_embeds"][0], expected)


TRACED_AGAIN = [
    *("text_encoder", "vae_encoder", "step+guidance"),
    *(pytest.param(name, marks=pytest.mark.full) for name in ("unet", "vae_decoder")),
]


@pytest.mark.parametrize("name", TRACED_AGAIN)
def test_exporting_twice_gives_the_same_graph(
    name: str, sd: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time was when the bundle was built, with the decompositions of `lowered`; this is without them."""
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", lowered.traced_again)
    checkpoint, shape = open_folder(checkpoints["sd"], None), Shape(SIZE[1], SIZE[0], 1)
    spec, shapes = image_graphs.own(checkpoint, name), columns(sd / TABLES)
    (graph,) = image_graphs.traced(checkpoint, spec, shape, tmp_path, columns=shapes).values()
    assert graph.names == Bundle.open(sd).manifest.graphs[name].names
    assert digest(tmp_path / graph.names) == digest(sd / graph.names)
    first, second = (onnx.load(folder / graph.file, load_external_data=False) for folder in (sd, tmp_path))
    for tensor in (*first.graph.initializer, *second.graph.initializer):
        del tensor.external_data[:]  # where the VAE's two graphs have a tensor in common
    assert first == second
    if graph.component != "vae":
        assert [digest(tmp_path / file) for file in graph.files] == [digest(sd / file) for file in graph.files]


def test_another_precision_of_one_stage_is_another_file(bundle_of: BundleFactory) -> None:
    fp32, fp16 = (Bundle.open(bundle_of("sd", precision)).manifest for precision in ("fp32", "fp16"))
    for name in fp32.graphs:
        arithmetic = name in ARITHMETIC  # the sampler's is in fp32 in every precision
        assert (fp32.graphs[name].precision, fp16.graphs[name].precision) == ("fp32", "fp32" if arithmetic else "fp16")
        small, large = (sum(m.files[f].size for f in m.graphs[name].data) for m in (fp16, fp32))
        assert small == large == 0 if arithmetic else 0.45 < small / large < 0.65


@pytest.mark.parametrize("family", FAMILIES)
def test_no_argmax_reads_integers(bundle_of: BundleFactory, family: str) -> None:
    """ONNX Runtime's CUDA provider has no such kernel, and would leave the node to the CPU."""
    bundle = Bundle.open(bundle_of(family))
    found = []
    for graph in bundle.manifest.graphs.values():
        model = onnx.shape_inference.infer_shapes(onnx.load(bundle.path / graph.file, load_external_data=False))
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
        found += [types[node.input[0]] for node in model.graph.node if node.op_type == "ArgMax"]
    assert found == [onnx.TensorProto.FLOAT] * {"sd": 0, "sdxl": 1}[family]


def test_a_group_norm_is_precise_where_a_picture_is_plain(tmp_path: Path) -> None:
    """Of equal numbers each rounding of a sum goes the same way, so there is to be no sum of many."""
    random = torch.Generator().manual_seed(0)
    levels = torch.rand((1, 16, 1, 1), generator=random) + 1
    picture = levels.expand(1, 16, 512, 512).clone()
    picture[:, :, 200:260, 200:260] += torch.randn((1, 16, 60, 60), generator=random)
    norm = torch.nn.GroupNorm(4, 16, eps=1e-6)
    expected = norm.double()(picture.double())[:, :, :100].detach().numpy()
    ours = torch.nn.Sequential(norm.float())
    group_norm.replace_group_norms(ours)
    torch.onnx.export(ours.eval(), (picture,), tmp_path / "norm.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: picture.numpy()})
    assert np.abs(made[:, :, :100] - expected).max() < 4e-6 * np.abs(expected).max()
