"""Remedies for fp16 are found where they are needed, and a checkpoint that needs all of them is built right.

ONNX Runtime's CPU provider computes part of an fp16 graph in fp32 and hides what overflows; onnx's own evaluator, in
numpy, rounds every result.
"""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import image_graphs
import numpy as np
import onnx
import pytest
import torch
from conftest import HALF, ON_ARGUMENTS, SIZE, BundleFactory, called
from diffusers.models.attention_processor import Attention
from here import phases_here
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from turbochain.export import remedies, tasks
from turbochain.export.chains import Layout, Placed
from turbochain.export.families import Shape
from turbochain.export.remedies import LARGEST, Remedy
from turbochain.export.sources.checkpoint import open_folder
from turbochain.export.tracing import attention
from turbochain.runtime import Bundle
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.cpu import CpuExecutor, CpuGraph
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.checks import bounds, metrics, reference, verify

CONV1, STREAM = "decoder.up_blocks.2.resnets.0.conv1", "decoder.mid_block.resnets.1"
UNET_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("family", HALF)
def test_a_checkpoint_that_fits_needs_nothing(
    bundle_of: BundleFactory, checkpoints: dict[str, Path], family: str
) -> None:
    """Not SDXL's VAE either, whose config has `force_upcast`."""
    bundle = Bundle.open(bundle_of(family, "fp16"))
    graphs = bundle.manifest.graphs
    assert {name: (g.precision, g.remedy) for name, g in graphs.items()} == {
        name: ("fp16" if g.component else "fp32", "") for name, g in graphs.items()
    }
    checkpoint = open_folder(checkpoints[family], None)
    assert {g.component for g in graphs.values() if g.precision == "fp16"} == {*checkpoint.family.components}
    specs = {n: image_graphs.own(checkpoint, n)[n] for n, g in graphs.items() if g.component}
    placed = {name: Placed(spec, Shape(*SIZE, 1)) for name, spec in specs.items()}
    decided = remedies.decide(placed, dict.fromkeys(placed, "fp16"), bundle.path / "reference.safetensors")
    assert decided == dict.fromkeys(placed, Remedy("fp16")) and {"vae_encoder", "vae_decoder"} < decided.keys()


@pytest.mark.parametrize("value", [1e5, math.inf, math.nan])
@pytest.mark.parametrize("role", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_what_has_no_remedy_is_fp32_and_says_so(role: str, value: float) -> None:
    module = {"vae_decoder": "decoder.conv_out", "vae_encoder": "quant_conv"}.get(role, "a.b")
    decided = remedies.remedy(role, {"": 1.0, module: value, STREAM: 1e5, "x.scores": 1e6})
    assert decided == Remedy("fp32", phrase=f"fp32: {module} reaches {value:.2g}")


def test_the_streams_of_a_vae_are_rescaled_below_the_limit() -> None:
    reached = {STREAM: 70000.0, CONV1: LARGEST * 8, f"{STREAM}.conv2": LARGEST / 4, "decoder.conv_in": LARGEST / 3.9}
    decided = remedies.remedy("vae_decoder", reached | {"encoder.conv_in": 1e9, "encoder.conv_out": 1e9})
    assert decided.precision == "fp16" and decided.phrase == "rescaled by up to 2^-5"
    assert decided.exponents == {STREAM: 3, CONV1: 5, "decoder.conv_in": 1}
    assert all(LARGEST / 8 < reached[m] * 2.0**-e <= LARGEST / 4 for m, e in decided.exponents.items())
    assert remedies.remedy("unet", reached).precision == "fp32"  # its stream is read by more than norms


def test_what_was_not_recorded_is_not_taken_to_fit() -> None:
    assert remedies.remedy("vae_encoder", {"decoder": 1.0, "decoder.conv_in": 1.0, "post_quant_conv": 1.0}) == Remedy(
        "fp32", phrase="fp32: the reference did not run it"
    )


def test_attentions_near_the_limit_are_islands() -> None:
    reached = {"b.attn1.scores": 2e4, "a.attn2.scores": 9e9, "c.attn1.scores": LARGEST / 4, "c": 3.0}
    decided = remedies.remedy("unet", reached)
    assert (decided.precision, decided.attention) == ("fp16", ("a.attn2", "b.attn1"))
    assert decided.phrase == "fp32 attention in a.attn2 and 1 more"


def test_another_precision_is_not_judged(checkpoints: dict[str, Path], sd: Path) -> None:
    checkpoint = open_folder(checkpoints["sd"], None)
    layout = Layout(
        checkpoint.family, checkpoint.configs, tasks.find(["text-to-image", "image-to-image"]), [Shape(*SIZE, 1)]
    )
    asked, arithmetic = layout.precisions("fp32", "bf16"), ("step", "step+guidance", "start")
    vae = {"vae_decoder": "bf16", "vae_encoder": "bf16"}
    assert asked == {"text_encoder": "fp32", "unet": "fp32", **vae, **dict.fromkeys(arithmetic, "fp32")}
    half = layout.precisions("fp16")
    assert {name for name, precision in half.items() if precision == "fp32"} == {*arithmetic}  # whatever is asked for
    decided = remedies.decide(layout.graphs(), asked, sd / "reference.safetensors")
    assert decided == {name: Remedy(precision) for name, precision in asked.items()}


def run_strictly(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(onnx.load(path)).run(None, feeds)


@pytest.mark.parametrize("context", [None, 24])
def test_an_islands_attention_is_right_where_fp16_is_not(tmp_path: Path, context: int | None) -> None:
    """Self- and cross-attention of diffusers; one entry of every query and key is constant and large."""
    torch.manual_seed(0)
    plain: Any = Attention(32, context, heads=2, dim_head=16, bias=True).eval().requires_grad_(False)
    for matrix in (plain.to_q, plain.to_k):
        matrix.weight[0], matrix.bias[0] = 0, 600  # 600² / √16 = 90,000
    inputs = [torch.randn(1, 20, 32)] + [torch.randn(1, 7, 24)] * (context is not None)
    right = plain(*inputs).numpy()
    results = {}
    for name in ("plain", "island"):
        model = torch.nn.Sequential()
        model.attention = plain.half()
        if name == "island":
            attention.upcast(model, ["attention"])
        examples = tuple(x.half() for x in inputs)
        program = torch.onnx.export(model.attention, examples, dynamo=True, opset_version=21, verbose=False)
        assert program is not None
        program.save(str(tmp_path / name))
        onnx.checker.check_model(str(tmp_path / name), full_check=True)  # the dtypes of every node agree
        feeds = {i.name: x.numpy() for i, x in zip(program.model.graph.inputs, examples, strict=True)}
        (results[name],) = run_strictly(tmp_path / name, feeds)
    assert not np.isfinite(results["plain"]).all()
    assert results["island"].dtype == np.float16
    assert metrics.relative_l2(results["island"], right) < 1e-2  # fp32 itself knows a score of 90,000 to 0.008


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def large_vae(t: dict[str, torch.Tensor]) -> None:
    """The same picture from a stream 30,000 times, and conv1 outputs 10,000 times as large."""
    for name in t:
        if re.match(r"decoder\..*(conv_in|conv2|to_out\.0)\.|decoder\..*(conv_shortcut|upsamplers.*)\.bias", name):
            t[name] *= 3e4
        elif re.match(r"decoder\..*conv1\.", name):
            t[name] *= 1e4


def large_unet_scores(t: dict[str, torch.Tensor]) -> None:
    """One normed channel is always 1, and one entry of every query and key 600 times it: 600² / √16 = 90,000."""
    t[f"{UNET_ATTENTION}.norm1.weight"][0], t[f"{UNET_ATTENTION}.norm1.bias"][0] = 0, 1
    for matrix in ("to_q", "to_k"):
        weight = t[f"{UNET_ATTENTION}.attn1.{matrix}.weight"]
        weight[0], weight[0, 0] = 0, 600


def large_text_scores(t: dict[str, torch.Tensor]) -> None:
    for matrix in ("q_proj", "k_proj"):  # 300² = 90,000, before the product is scaled
        name = f"text_model.encoder.layers.0.self_attn.{matrix}"
        t[f"{name}.weight"][0], t[f"{name}.bias"][0] = 0, 300


def large_text_values(t: dict[str, torch.Tensor]) -> None:
    """No norm reads a hidden value of an MLP."""
    prefix = next(name for name in t if name.endswith("layers.0.mlp.fc1.bias")).removesuffix("fc1.bias")
    t[f"{prefix}fc1.bias"][0] = 1e5
    t[f"{prefix}fc2.weight"][:, 0] = 1e-5


LARGE = {
    "vae/diffusion_pytorch_model.safetensors": large_vae,
    "unet/diffusion_pytorch_model.safetensors": large_unet_scores,
    "text_encoder/model.safetensors": large_text_scores,
    "text_encoder_2/model.safetensors": large_text_values,
}
TOLD = {
    "text_encoder": r"fp32 attention in .*layers\.0\.self_attn",
    "text_encoder_2": r"fp32: .*layers\.0\.mlp\.\S+ reaches 1e\+05",
    "unet": rf"fp32 attention in {re.escape(UNET_ATTENTION)}\.attn1",
    "vae_decoder": r"rescaled by up to 2\^-\d+",
}


@pytest.fixture(scope="module")
def large(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDXL miniature with every component beyond fp16's range."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    shutil.copytree(checkpoints["sdxl"], folder)
    for name, change in LARGE.items():
        edit(folder / name, change)
    return folder


@pytest.fixture(scope="module")
def built(large: Path) -> tuple[Bundle, subprocess.CompletedProcess[str]]:
    path = large.with_name("large.bundle")
    size = "x".join(map(str, SIZE))
    shape = ("--precision", "fp16", "--size", size, "--steps", "1", "--tasks", "text-to-image")
    with phases_here():
        done = called("build-engine", large, "-o", path, *shape, *ON_ARGUMENTS)
    assert done.returncode == 0, done.stderr
    return Bundle.open(path), done


def test_a_build_says_what_it_remedied(built: tuple[Bundle, subprocess.CompletedProcess[str]]) -> None:
    bundle, done = built
    graphs = bundle.manifest.graphs
    shown = called("turbochain", "inspect", bundle.path).stdout
    for name, phrase in TOLD.items():
        assert re.fullmatch(phrase, graphs[name].remedy), graphs[name].remedy
        assert graphs[name].precision == ("fp32" if name == "text_encoder_2" else "fp16")
        assert re.search(rf"^range of fp16: {name} +{re.escape(graphs[name].remedy)}$", done.stderr, re.M)
        for table in (done.stdout, shown):
            assert re.search(rf"^{name} .* {re.escape(graphs[name].remedy)}$", table, re.M)


class StrictGraph(CpuGraph):
    """onnx's own evaluator, which computes fp16 in fp16."""

    def __init__(self, path: Path, graph: Graph) -> None:
        self.path, self.graph = path, graph

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        def launch() -> None:
            results = run_strictly(self.path, {t.name: arrays[t.name] for t in self.graph.inputs})
            for tensor, value in zip(self.graph.outputs, results, strict=True):
                np.copyto(arrays[tensor.name], value)

        return launch

    def operators(self) -> Iterator[tuple[str, float]]:
        raise NotImplementedError


class StrictExecutor(CpuExecutor):
    def load_graph(self, graph: str) -> StrictGraph:
        entry = self.opened.bundle.manifest.graphs[graph]
        return StrictGraph(self.opened.bundle.path / entry.file, entry)


def test_what_was_built_is_right_in_strict_fp16(built: tuple[Bundle, subprocess.CompletedProcess[str]]) -> None:
    bundle, _ = built
    chain = bundle.open_chain()
    executor = StrictExecutor(Opened(bundle, bundle.path, {}, Device("cpu")))
    executor.load(chain.graphs)
    checks = verify.verify(chain, executor, {name: graph.precision for name, graph in chain.graphs.items()})
    assert {check.stage for check in checks} == {*chain.graphs, "ids", "schedule", "image"}
    verify.require(checks)


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_without_its_remedy_it_is_not(
    built: tuple[Bundle, subprocess.CompletedProcess[str]], large: Path, tmp_path: Path, name: str
) -> None:
    """So it is the remedy that the test above passes by."""
    bundle, _ = built
    component = bundle.manifest.graphs[name].component
    checkpoint = open_folder(large, None)
    specs = image_graphs.own(checkpoint, name)
    assert specs[name].component == component
    graph = image_graphs.traced(checkpoint, specs, Shape(*SIZE, 1), tmp_path, Remedy("fp16"))[name]
    case = next(case for case in reference.read(bundle, "text-to-image").cases if not case.modes)
    feeds = case.tensors | {"next_latents": case.tensors["next_latents"][-1]}
    path = tmp_path / graph.file
    model = onnx.load(path)
    if name == "vae_decoder":  # the last value before the clamp: uint8 has no NaN
        clip = next(node for node in model.graph.node if node.op_type == "Clip")
        model.graph.output.append(onnx.helper.make_tensor_value_info(clip.input[0], onnx.TensorProto.FLOAT, None))
        onnx.save(model, path)
    *_, result = run_strictly(path, {t.name: feeds[t.name] for t in graph.inputs})
    assert not np.isfinite(result).all()


def test_the_name_map_says_by_what_a_parameter_was_multiplied(
    built: tuple[Bundle, subprocess.CompletedProcess[str]], large: Path
) -> None:
    bundle, _ = built
    graph = bundle.manifest.graphs["vae_decoder"]
    names = json.loads((bundle.path / graph.names).read_text())
    weights = load_file(large / "vae/diffusion_pytorch_model.safetensors")
    model = onnx.load(bundle.path / graph.file)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    scaled = {name: place for name, place in names.items() if "factor" in place}
    assert {"decoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.bias"} <= set(scaled)
    for name, place in scaled.items():
        value = (weights[name] * place["factor"]).half().numpy()
        np.testing.assert_array_equal(held[place["initializer"]].reshape(value.shape), value)


def test_a_bf16_decoder_is_valid_and_within_its_bound(sd: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    bundle, checkpoint = Bundle.open(sd), open_folder(checkpoints["sd"], None)
    specs = image_graphs.own(checkpoint, "vae_decoder")
    graph = image_graphs.traced(checkpoint, specs, Shape(*SIZE, 1), tmp_path, Remedy("bf16"))["vae_decoder"]
    onnx.checker.check_model(tmp_path / graph.file, full_check=True)
    names = json.loads((tmp_path / graph.names).read_text())
    assert "initializer" in names["decoder.conv_in.weight"] and "initializer" not in names["encoder.conv_in.weight"]
    case = reference.read(bundle, "text-to-image").cases[0]
    (image,) = run_strictly(tmp_path / graph.file, {"next_latents": case.tensors["next_latents"][-1]})
    bound = bounds.BOUNDS["bf16"]["picture"]["psnr"]
    assert metrics.psnr(image, case.tensors["image"]) >= bound > bounds.BOUNDS["fp16"]["picture"]["psnr"]
