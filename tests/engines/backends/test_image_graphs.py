"""The VAE's encoder on OpenVINO in lower precisions, against diffusers in fp32; graphs that no shared bundle has.

The other engines' forms of the shared bundles' graphs, the encoder among them, have tests of their own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import image_graphs
import numpy as np
import onnx
import openvino
import pytest
import torch
from conftest import BundleFactory
from cuda_forms import ON_HOST, assert_all_on_gpu, kinds, ragged, unequal
from diffusers import AutoencoderKL
from fp64 import in_fp64
from image_graphs import SQUARE
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from test_tensorrt import serialize

from turbochain.engines.forms import cuda
from turbochain.engines.forms.tensorrt import rewrite
from turbochain.export.families import common
from turbochain.export.remedies import Remedy
from turbochain.runtime import Bundle
from turbochain.runtime.backends import openvino_model
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.checks.bounds import BOUNDS
from turbochain.runtime.checks.metrics import relative_l2

Traced = tuple[Path, Mapping[str, Graph]]


@pytest.fixture(scope="module")
def half(bundle_of: BundleFactory) -> Traced:
    """SD's encoder in fp16, of a shared bundle."""
    bundle = Bundle.open(bundle_of("sd", "fp16"))
    return bundle.path, bundle.manifest.graphs


@pytest.fixture(scope="module")
def bf16(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """SDXL's encoder in bf16."""
    opened, folder = image_graphs.checkpoint(checkpoints["sdxl"]), tmp_path_factory.mktemp("bf16")
    specs = image_graphs.own(opened, "vae_encoder")
    return folder, image_graphs.traced(opened, specs, SQUARE, folder, Remedy("bf16"))


@pytest.fixture(scope="module")
def others(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What no shared bundle has: inpainting's own graph, and a guided step with a history."""
    opened, folder = image_graphs.checkpoint(checkpoints["sd"]), tmp_path_factory.mktemp("others")
    specs = image_graphs.own(opened, "blend") | {"multistep": common.guided_step(2)}
    found = image_graphs.traced(opened, specs, SQUARE, folder)
    return {name: folder / graph.file for name, graph in found.items()}


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


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("name", ["blend", "multistep"])
def test_every_engine_takes_it(others: dict[str, Path], tmp_path: Path, name: str) -> None:
    """As `test_tensorrt`, `test_tensorrt_form` and `test_cuda_forms` try the graphs of the shared bundles."""
    path = others[name]
    size, said = serialize(path, name)
    assert size > 1000 and re.findall(r"^Name: ([^,]+), LayerType: \w+", said, re.M)
    old, draw = in_fp64(path), np.random.default_rng(0)
    onnx.save(old, tmp_path / "wide.onnx")
    new = onnx.load_from_string(rewrite(tmp_path / "wide.onnx"))
    feeds = {i.name: draw.normal(size=[d.dim_value for d in i.type.tensor_type.shape.dim]) for i in old.graph.input}
    for expected, made in zip(*(ReferenceEvaluator(model).run(None, feeds) for model in (old, new)), strict=True):
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    assert kinds(old.graph.node) == kinds(new.graph.node)
    assert_all_on_gpu(path, tmp_path)


def test_the_cuda_form_in_bf16_leaves_nothing_to_the_host(bf16: Traced) -> None:
    """ONNX Runtime's CPU provider does not take bf16, so the form is seen as it is."""
    folder, graphs = bf16
    path = folder / graphs["vae_encoder"].file
    form = onnx.load_from_string(cuda.rewrite(path))
    found = form.graph.node
    assert not kinds(found) & {*ON_HOST, "GroupNormalization"} and not unequal(found) and not ragged(form)
