"""The data files that the graphs of a component share, and the three backends that read them."""

import dataclasses
import gc
import hashlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from conftest import SIZE, BundleFactory
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from safetensors.numpy import load_file

from turbochain.export import estimate, load, tables, tasks
from turbochain.export.chains import Layout, Placed
from turbochain.export.families import Shape
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.export.tracing import trace, weights
from turbochain.export.tracing.trace import TraceOrder
from turbochain.runtime import Bundle
from turbochain.runtime.backends.tensorrt import logger, trt
from turbochain.runtime.bundle.hashing import digest

LIMIT = 2**20  # so that the miniature's UNet takes several files
SMALL, WIDE = Shape(SIZE[1], SIZE[0], 1), Shape(SIZE[1], 2 * SIZE[0], 1)


def columns_of(bundle: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what the UNet reads of a table."""
    return tables.columns(bundle / Bundle.open(bundle).open_chain().chain.tables_file)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def two(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    bundle_of: BundleFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Checkpoint, Path]:
    """A checkpoint, and its UNet at two sizes in a folder."""
    checkpoint = open_folder(checkpoints[request.param], None)
    folder = tmp_path_factory.mktemp(f"two-{request.param}")
    spec, remedy = checkpoint.family.graphs["unet"], Remedy("fp32")
    wanted = [TraceOrder("unet", Placed(spec, SMALL), remedy), TraceOrder("unet@wide", Placed(spec, WIDE), remedy)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "LIMIT", LIMIT)
        made = trace.export_graphs(checkpoint, "unet", wanted, columns_of(bundle_of(request.param)), folder)
    for name, graph in made.items():
        locations = {t.location for t in external(folder, name).values()}
        assert set(graph.data) == {f"graphs/{location}" for location in locations} and graph.file.endswith(".onnx")
        assert len(graph.data) == len(locations)
        onnx.checker.check_model(folder / graph.file, full_check=True)
    return checkpoint, folder


def path_of(folder: Path, graph: str) -> Path:
    return folder / "graphs" / f"{graph}.onnx"


def external(folder: Path, graph: str) -> dict[str, ExternalDataInfo]:
    """Initializer → where its data is, as the onnx package reads it."""
    model = onnx.load(path_of(folder, graph), load_external_data=False)
    return {t.name: ExternalDataInfo(t) for t in model.graph.initializer if uses_external_data(t)}


def places(folder: Path, graph: str) -> set[tuple[str, int, int]]:
    """File, offset and length of everything that a graph reads of shared files."""
    found = external(folder, graph).values()
    return {(t.location, t.offset, t.length) for t in found if t.location != f"{graph}.onnx.data"}


def hashes(folder: Path) -> Iterator[str]:
    """The SHA-256 of every weight of a checkpoint's component."""
    (file,) = folder.glob("*.safetensors")
    for array in load_file(file).values():
        yield hashlib.sha256(array.astype(np.float32).tobytes()).hexdigest()


def test_two_sizes_share_their_weights(two: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = two
    assert places(folder, "unet") == places(folder, "unet@wide")
    for graph in ("unet", "unet@wide"):
        arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(path_of(folder, graph)).graph.initializer]
        shared = sum(length for _, _, length in places(folder, graph))
        # SDXL's own constant is half a matrix, which is 0.06% in full size.
        assert shared >= {"sd": 0.99, "sdxl": 0.98}[checkpoint.family.name] * sum(a.nbytes for a in arrays)
    on_disk = sum(p.stat().st_size for p in (folder / "graphs").iterdir() if p.name.startswith("unet@wide"))
    assert on_disk < 0.05 * sum(p.stat().st_size for p in (folder / "graphs").glob("unet.fp32-*.data"))


def test_each_weight_of_the_checkpoint_is_stored_once(two: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = two
    files = {p.name: p.read_bytes() for p in (folder / "graphs").glob("unet.fp32-*.data")}
    assert sorted(files) == [f"unet.fp32-{i}.data" for i in range(len(files))] and len(files) > 2
    assert all(len(data) <= LIMIT for data in files.values())
    read = sorted(places(folder, "unet") | places(folder, "unet@wide"))
    ends = dict.fromkeys(files, 0)
    found = []
    for name, offset, length in read:
        assert 0 <= offset - ends[name] < 64 and offset % 64 == 0
        assert not any(files[name][ends[name] : offset])
        ends[name] = offset + length
        found.append(hashlib.sha256(files[name][offset : offset + length]).hexdigest())
    assert ends == {name: len(data) for name, data in files.items()}
    assert len(found) == len(set(found))
    assert set(found) <= set(hashes(checkpoint.folder / "unet"))


def test_small_constants_are_inline_and_what_is_no_weight_is_beside_its_graph(two: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = two
    for graph in ("unet", "unet@wide"):
        outside = external(folder, graph)
        for tensor in onnx.load(path_of(folder, graph)).graph.initializer:
            assert (onnx.numpy_helper.to_array(tensor).nbytes > weights.INLINE) == (tensor.name in outside)
        own = {name for name, t in outside.items() if t.location == f"{graph}.onnx.data"}
        assert len(own) == (
            1 if checkpoint.family.name == "sdxl" else 0
        )  # the part of a matrix that reads the pooled embeds
        assert path_of(folder, graph).with_suffix(".onnx.data").exists() == bool(own)


def examples(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        i.name: random.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in model.graph.input
    }


@pytest.mark.parametrize("graph", ["unet", "unet@wide"])
def test_backends_read_several_files_as_they_read_one_model(two: tuple[Checkpoint, Path], graph: str) -> None:
    _, folder = two
    path = path_of(folder, graph)
    model = onnx.load(path)  # with the data of all files in it
    whole, feeds = model.SerializeToString(), examples(model)
    ours = [onnxruntime.InferenceSession(source).run(None, feeds)[0] for source in (str(path), whole)]
    assert np.isfinite(ours[0]).all()
    np.testing.assert_array_equal(*ours)
    theirs, core = [], openvino.Core()
    for source in (path, whole):
        read = core.read_model(source)
        theirs.append(core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)[0])
    np.testing.assert_array_equal(*theirs)
    np.testing.assert_allclose(theirs[0], ours[0], atol=1e-3 * np.abs(ours[0]).max())


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_tensorrt_parses_several_files_as_it_parses_one_model(two: tuple[Checkpoint, Path]) -> None:
    _, folder = two
    path = path_of(folder, "unet")
    found = []
    for source in (path, onnx.load(path).SerializeToString()):
        builder = trt.Builder(logger())
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger())
        parsed = parser.parse_from_file(str(source)) if isinstance(source, Path) else parser.parse(source)
        assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        found.append([layer_of(network.get_layer(i)) for i in range(network.num_layers)])
    assert found[0] == found[1]
    assert sum(bool(weight) for _, weight in found[0]) > 100


def layer_of(layer: Any) -> tuple[str, str]:
    """A layer's kind, and the hash of its weights if it is a constant."""
    if layer.type != trt.LayerType.CONSTANT:
        return str(layer.type), ""
    layer.__class__ = trt.IConstantLayer
    return str(layer.type), hashlib.sha256(np.asarray(layer.weights).tobytes()).hexdigest()


def test_graphs_of_one_component_have_precisions_of_their_own(
    checkpoints: dict[str, Path], bundle_of: BundleFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_folder(checkpoints["sd"], None)
    bundles = {precision: Bundle.open(bundle_of("sd", precision)).manifest.files for precision in ("fp32", "fp16")}
    loaded: list[weakref.ref[torch.nn.Module]] = []
    component = load.component

    def watched(*arguments: Any, **more: Any) -> Any:
        gc.collect()
        assert not any(reference() for reference in loaded), "the component is in memory twice"
        model = component(*arguments, **more)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(load, "component", watched)
    spec = checkpoint.family.graphs["text_encoder"]
    plain = TraceOrder("text_encoder", Placed(spec, SMALL), Remedy("fp32"))
    half = dataclasses.replace(plain, name="text_encoder+half", remedy=Remedy("fp16"))
    pair = TraceOrder("text_encoder*2", Placed(spec, dataclasses.replace(SMALL, batch=2)), Remedy("fp32"))
    made = trace.export_graphs(checkpoint, "text_encoder", [plain, half, pair], {}, tmp_path)
    assert len(loaded) == 2
    assert {name: (graph.precision, *graph.data) for name, graph in made.items()} == {
        name: (precision, f"graphs/text_encoder.{precision}-0.data", f"graphs/{name}.onnx.data")
        for name, precision in (("text_encoder", "fp32"), ("text_encoder+half", "fp16"), ("text_encoder*2", "fp32"))
    }
    for (precision, files), name in zip(bundles.items(), ("text_encoder", "text_encoder+half"), strict=True):
        assert digest(tmp_path / made[name].data[0]) == files[f"graphs/text_encoder.{precision}-0.data"].sha256
    made_before = bundles["fp32"]["graphs/text_encoder.onnx"]  # the other's file names its own constants' file
    assert digest(tmp_path / made["text_encoder"].file) == made_before.sha256


def test_a_graph_is_made_with_its_own_remedy(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Rescaled weights are other tensors; those that no remedy changes are still stored once."""
    checkpoint = open_folder(checkpoints["sd"], None)
    decoder = Placed(checkpoint.family.graphs["vae_decoder"], SMALL)
    plain = TraceOrder("plain", decoder, Remedy("fp16"))
    halved = TraceOrder("halved", decoder, Remedy("fp16", {"decoder.mid_block.resnets.0": 1}))
    trace.export_graphs(checkpoint, "vae", [plain, halved], {}, tmp_path)
    one, other = places(tmp_path, "plain"), places(tmp_path, "halved")
    assert one & other and one - other and other - one
    (file,) = (checkpoint.folder / "vae").glob("*.safetensors")
    stored = load_file(file)
    factors: dict[str, set[float]] = {}
    for graph in ("plain", "halved"):
        held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path_of(tmp_path, graph)).graph.initializer}
        names = json.loads((tmp_path / "graphs" / f"{graph}.names.json").read_text())
        places_of = {parameter: place for parameter, place in names.items() if "initializer" in place}
        factors[graph] = {place.get("factor", 1) for place in places_of.values()}
        for parameter, place in places_of.items():
            expected = (stored[parameter] * np.float32(place.get("factor", 1))).astype(np.float16)
            np.testing.assert_array_equal(held[place["initializer"]].reshape(expected.shape), expected, parameter)
    assert factors["plain"] == {1} and factors["halved"] >= {0.5, 1}


def test_large_tensors_start_at_a_page_and_files_end_at_the_limit(tmp_path: Path) -> None:
    files = weights.DataFiles(tmp_path, "x-{}.data", limit=5 * 2**20)
    arrays = [np.full(size, i, np.uint8) for i, size in enumerate((2000, 2**21, 3000, 2**22, 2**23, 2**21))]
    found = [files.place(array, weights.fingerprint(array)) for array in (*arrays, *arrays)]
    assert found[:6] == found[6:]  # the second time nothing is written
    assert [name for name, _ in found[:6]] == [f"x-{i}.data" for i in (0, 0, 0, 1, 2, 3)]  # one is over the limit alone
    for (name, offset), array in zip(found, arrays, strict=False):
        assert offset % (4096 if array.nbytes >= 2**20 else 64) == 0
        np.testing.assert_array_equal(np.fromfile(tmp_path / name, np.uint8, array.nbytes, offset=offset), array)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < sum(a.nbytes for a in arrays) + 2 * 4096


def test_a_parameter_is_told_by_its_values_not_by_its_memory() -> None:
    linear = torch.nn.Linear(8, 8)
    parameters = weights.Parameters(linear)
    matrix = linear.weight.detach().numpy()
    same = (matrix, matrix.copy(), matrix.reshape(2, 4, 8))
    others = (matrix.T, matrix[:4], matrix[::2], matrix.view(np.int32), -matrix)
    for array in (*same, *others):
        found = parameters.fingerprint(array)
        assert found.sha256 == hashlib.sha256(array.tobytes()).digest()
        assert (found.nbytes, found.dtype) == (array.nbytes, str(array.dtype))
    assert all(parameters.fingerprint(array) in parameters for array in same)
    assert not any(parameters.fingerprint(array) in parameters for array in others)


def test_a_shared_file_counts_once(sd: Path) -> None:
    bundle = Bundle.open(sd)
    chain, graphs = bundle.open_chain("image-to-image"), bundle.manifest.graphs  # which runs them all
    assert {*chain.graphs} == {*graphs} and graphs["vae_decoder"].data == graphs["vae_encoder"].data != ()
    alone = chain.weight_bytes()
    assert alone == sum(path.stat().st_size for path in (sd / "graphs").glob("*.data"))
    decoder = dataclasses.replace(graphs["vae_decoder"], data=graphs["unet"].data + graphs["vae_decoder"].data)
    manifest = dataclasses.replace(bundle.manifest, graphs={**graphs, "vae_decoder": decoder})
    assert Bundle(sd, manifest).open_chain("image-to-image").weight_bytes() == alone


def test_a_second_graph_of_a_component_needs_no_more_disk_and_memory(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_folder(checkpoints["sd"], None)
    counts = dict.fromkeys(checkpoint.family.components, 10**6)
    layout = Layout(checkpoint.family, checkpoint.configs, tasks.find(["text-to-image"]), [SMALL])
    graphs, precisions = layout.graphs(), layout.precisions("fp16")
    small, wide = graphs["unet"], Placed(graphs["unet"].spec, WIDE)

    def needs(second: str | None) -> estimate.Needs:
        unets = {"unet": small, "unet@wide": wide} if second else {"unet": wide}
        named = {**precisions, "unet@wide": second or ""}
        return estimate.needs({**graphs, **unets}, checkpoint.configs, counts, named, 0)

    alone, same, other = needs(None), needs("fp16"), needs("fp32")
    assert same.disk == alone.disk < other.disk
    assert same.memory["verify"] == alone.memory["verify"] < other.memory["verify"]  # which has weights of its own
