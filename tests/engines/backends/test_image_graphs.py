"""The graphs of image-to-image, inpainting and guidance in every engine's form, and on libraries besides ONNX Runtime.

The encoder in lower precisions against diffusers in fp32; the forms against the graphs that they are made of.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import image_graphs
import numpy as np
import onnx
import openvino
import pytest
import torch
from diffusers import AutoencoderKL
from fp64 import in_fp64
from image_graphs import SQUARE
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from test_cuda_forms import ON_HOST, kinds, unequal
from test_tensorrt import serialize

from turbochain.engines.forms import form
from turbochain.engines.forms.bf16 import widen
from turbochain.engines.forms.group_norm import expand_group_norms
from turbochain.engines.forms.tensorrt import rewrite
from turbochain.export.families import common
from turbochain.export.remedies import Remedy
from turbochain.runtime.backends import onnxruntime_sessions as sessions
from turbochain.runtime.backends import openvino_model
from turbochain.runtime.backends.onnxruntime import CUDA_WITHOUT
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.checks.bounds import BOUNDS
from turbochain.runtime.checks.metrics import relative_l2

Traced = tuple[Path, dict[str, Graph]]


def encoder_of(checkpoint: Path, folder: Path, precision: str) -> Traced:
    opened = image_graphs.checkpoint(checkpoint)
    specs = {"vae_encoder": image_graphs.encoder(opened)}
    return folder, image_graphs.traced(opened, specs, SQUARE, folder, Remedy(precision))


@pytest.fixture(scope="module")
def half(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """SD's encoder in fp16, and the graphs without weights; the sampler's step also with a history."""
    folder, graphs = encoder_of(checkpoints["sd"], tmp_path_factory.mktemp("half"), "fp16")
    opened = image_graphs.checkpoint(checkpoints["sd"])
    specs = image_graphs.arithmetic() | {"multistep": common.guided_step(2)}
    return folder, graphs | image_graphs.traced(opened, specs, SQUARE, folder)


@pytest.fixture(scope="module")
def bf16(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """SDXL's encoder in bf16."""
    return encoder_of(checkpoints["sdxl"], tmp_path_factory.mktemp("bf16"), "bf16")


def case(vae: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What the encoder reads, and what diffusers' makes of it in fp32."""
    model = AutoencoderKL.from_pretrained(vae)
    images, generator = image_graphs.pictures(SQUARE), torch.Generator().manual_seed(0)
    read = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.inference_mode():
        posterior = model.encode(read).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(0)) * model.config.scaling_factor
    noise = torch.randn(expected.shape, generator=generator)
    return {"input_image": images, "posterior_noise": noise.numpy()}, expected.numpy()


def on_openvino(traced: Traced, feeds: dict[str, Any], hint: str = "f32") -> np.ndarray:
    """As the runtime reads the encoder."""
    folder, graphs = traced
    model = openvino.Core().read_model(folder / graphs["vae_encoder"].file)
    openvino_model.prepare(model)
    made = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})(feeds)
    return np.array(made[0])


def test_the_first_node_casts_the_picture(half: Traced, bf16: Traced) -> None:
    """TensorRT refuses uint8 anywhere else."""
    for precision, (folder, graphs) in (("fp16", half), ("bf16", bf16)):
        graph = graphs["vae_encoder"]
        assert graph.precision == precision and graph.data[0] == f"graphs/vae.{precision}-0.data"
        onnx.checker.check_model(folder / graph.file, full_check=True)
        proto = onnx.load(folder / graph.file, load_external_data=False).graph
        assert [node for node in proto.node if "input_image" in node.input] == [proto.node[0]]
        assert proto.node[0].op_type == "Cast"
        made = {a.i for node in proto.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
        inside = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
        assert made == {TensorProto.FLOAT, inside}
        weights = {t.data_type for t in proto.initializer if len(t.dims) == 4 and t.data_location}
        assert weights == {inside}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_openvino_runs_the_encoder(checkpoints: dict[str, Path], half: Traced, bf16: Traced, precision: str) -> None:
    """Within the bounds of its precision."""
    traced, family = {"fp16": (half, "sd"), "bf16": (bf16, "sdxl")}[precision]
    feeds, expected = case(checkpoints[family] / "vae")
    error = relative_l2(on_openvino(traced, feeds), expected)
    assert 1e-5 < error < BOUNDS[precision]["image_latents"]["relative_l2"]


def test_onnx_runtime_runs_the_encoder_in_fp16(checkpoints: dict[str, Path], half: Traced) -> None:
    feeds, expected = case(checkpoints["sd"] / "vae")
    made = image_graphs.run(half[0], half[1]["vae_encoder"], feeds)["image_latents"]
    assert 1e-5 < relative_l2(made, expected) < BOUNDS["fp16"]["image_latents"]["relative_l2"]


def reads_flattened(model: onnx.ModelProto) -> int:
    """How many norms read what a Reshape made."""
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    norms = [node for node in model.graph.node if node.op_type == "GroupNormalization"]
    return sum(made_by[norm.input[0]] == "Reshape" for norm in norms)


def test_tensorrts_forms_compute_the_same(half: Traced, tmp_path: Path) -> None:
    """In fp64, by ONNX's own evaluator."""
    folder, graphs = half
    for name, graph in graphs.items():
        old, wide, draw = in_fp64(folder / graph.file), tmp_path / f"{name}.onnx", np.random.default_rng(0)
        onnx.save(old, wide)
        new = onnx.load_from_string(rewrite(wide))
        feeds = {t.name: draw.normal(size=t.shape) for t in graph.inputs}
        for expected, made in zip(*(ReferenceEvaluator(m).run(None, feeds) for m in (old, new)), strict=True):
            np.testing.assert_allclose(made, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
        assert (reads_flattened(old), reads_flattened(new)) == (name == "vae_encoder", 0)  # the attention's norm
        assert kinds(old.graph.node) == kinds(new.graph.node)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_tensorrt_builds_every_graph(half: Traced) -> None:
    """In its own form, and the encoder as it is too."""
    folder, graphs = half
    built = [(name, True) for name in graphs] + [("vae_encoder", False)]
    for name, rewritten in built:
        size, said = serialize(folder / graphs[name].file, name, rewrite=rewritten)
        assert size > 1000 and re.findall(r"^Name: ([^,]+), LayerType: \w+", said, re.M)


def test_the_cuda_provider_leaves_nothing_to_the_host(half: Traced, bf16: Traced, tmp_path: Path) -> None:
    """As ONNX Runtime would run the forms; its CPU provider does not take bf16, so that form is seen as it is."""
    folder, graphs = half
    for name, graph in graphs.items():
        options = sessions.default_options()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        path = folder / f"graphs/{name}.form.onnx"  # beside the data
        path.write_bytes(form(folder / graph.file, [expand_group_norms, widen]))
        sessions.load(str(path), name, options, sessions.CPU, {}, CUDA_WITHOUT)
        found = list(onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)
        assert found and not kinds(found) & {*ON_HOST, "GroupNormalization", "Pad"} and not unequal(found), name
    folder, graphs = bf16
    found = onnx.load_from_string(form(folder / graphs["vae_encoder"].file, [expand_group_norms, widen])).graph.node
    assert not kinds(found) & {*ON_HOST, "GroupNormalization"} and not unequal(found)


def test_the_cuda_form_of_the_encoder_is_right(checkpoints: dict[str, Path], half: Traced) -> None:
    folder, graphs = half
    graph = graphs["vae_encoder"]
    feeds, expected = case(checkpoints["sd"] / "vae")
    (folder / "graphs/cuda.onnx").write_bytes(form(folder / graph.file, [expand_group_norms, widen]))
    made = image_graphs.run(folder, dataclasses.replace(graph, file="graphs/cuda.onnx"), feeds)["image_latents"]
    assert 1e-5 < relative_l2(made, expected) < BOUNDS["fp16"]["image_latents"]["relative_l2"]
