"""A picture becomes the latents that diffusers' pipelines for image-to-image and inpainting make of it."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_graphs
import numpy as np
import onnx
import openvino
import pytest
import torch
from conftest import FAMILIES
from diffusers import AutoencoderKL, AutoencoderTiny
from image_graphs import SQUARE, WIDE
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from turbochain.export import remedies
from turbochain.export.families import Shape
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import modules
from turbochain.runtime import Bundle
from turbochain.runtime.backends import openvino_model
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.checks.bounds import BOUNDS
from turbochain.runtime.checks.metrics import relative_l2

MEAN, STD = [0.4, -0.7, 1.1, 0.2], [0.5, 1.8, 0.9, 1.3]
CONFIGS: dict[str, dict[str, Any]] = {
    "neither": {},
    "mean": {"latents_mean": MEAN},
    "std": {"latents_std": STD},
    "both": {"latents_mean": MEAN, "latents_std": STD},
    "another scale": {"scaling_factor": 0.3, "shift_factor": 0.6, "latents_mean": MEAN, "latents_std": STD},
}
PLAIN = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_graphs.tiny_vae(tmp_path_factory.mktemp("tiny"))


ATTENTION = "encoder.mid_block.attentions.0"
Traced = Callable[[Checkpoint, Shape], tuple[Path, dict[str, Graph]]]


@pytest.fixture(scope="module")
def traced(sd: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """(checkpoint, shape) → a folder and the graphs in it: the encoder, and SD's decoder; of a bundle that has them."""

    both = {name: graph for name, graph in Bundle.open(sd).manifest.graphs.items() if graph.component == "vae"}
    made = {(checkpoints["sd"] / "vae", SQUARE): (sd, both)}

    def trace(checkpoint: Checkpoint, shape: Shape) -> tuple[Path, dict[str, Graph]]:
        key = (checkpoint.parts["vae"].folder, shape)
        if key not in made:
            folder, specs = tmp_path_factory.mktemp("traced"), {"vae_encoder": image_graphs.encoder(checkpoint)}
            if checkpoint.family.name == "sd":
                specs["vae_decoder"] = checkpoint.family.graphs["vae_decoder"]
            made[key] = folder, image_graphs.traced(checkpoint, specs, shape, folder)
        return made[key]

    return trace


def size_of_latents(shape: Shape) -> tuple[int, ...]:
    return shape.batch, 4, shape.height // 8, shape.width // 8


def of_image_to_image(pipe: Any, shape: Shape, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Image latents as the pipeline has them before it adds noise, and the posterior noise that it drew for them."""
    generator, again = (torch.Generator().manual_seed(7) for _ in range(2))
    pipe.scheduler.set_timesteps(4)
    read = pipe.image_processor.preprocess(image_graphs.pils(images))
    with image_graphs.spied(pipe.scheduler, "add_noise") as calls, torch.inference_mode():
        timestep = pipe.scheduler.timesteps[2:3].repeat(shape.batch)
        pipe.prepare_latents(read, timestep, shape.batch, 1, torch.float32, torch.device("cpu"), generator)
    (((latents, noise, _), _),) = calls
    drawn = torch.randn(size_of_latents(shape), generator=again)
    # The start noise is drawn second, or first of all if the VAE has no distribution.
    second = torch.randn(size_of_latents(shape), generator=again)
    assert torch.equal(noise, drawn if "Tiny" in type(pipe.vae).__name__ else second)
    return latents, drawn


def of_inpainting(pipe: Any, images: np.ndarray) -> torch.Tensor:
    read = pipe.image_processor.preprocess(image_graphs.pils(images))
    with torch.inference_mode():
        return pipe._encode_vae_image(read, torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipelines(family: str, checkpoints: dict[str, Path]) -> tuple[Any, Any]:
    return image_graphs.pipelines(checkpoints[family], family)


def encoded(pipelines: tuple[Any, Any], vae: Any, shape: Shape) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """What the graph reads, and what the two pipelines make of the same with this VAE."""
    for pipe in pipelines:
        pipe.vae = vae
    images = image_graphs.pictures(shape)
    latents, noise = of_image_to_image(pipelines[0], shape, images)
    feeds = {"input_image": images} | ({} if isinstance(vae, AutoencoderTiny) else {"posterior_noise": noise.numpy()})
    return feeds, latents, of_inpainting(pipelines[1], images)


def on_openvino(path: Path, vae: Any, feeds: dict[str, Any]) -> np.ndarray:
    """As the runtime reads the graph: every norm is fused there."""
    model = openvino.Core().read_model(path)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in vae.encoder.modules())
    assert openvino_model.fuse_group_norms(model) == norms
    openvino_model.prepare(model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(feeds)[0])


TRACED = {("sd", "own", SQUARE), ("sdxl", "tiny", WIDE)}
"""Of what graphs are traced; PyTorch computes all."""


@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("kind", ["own", "tiny"])
def test_latents_are_those_of_both_pipelines(
    pipelines: tuple[Any, Any],
    checkpoints: dict[str, Path],
    tiny: Path,
    traced: Traced,
    family: str,
    kind: str,
    shape: Shape,
) -> None:
    other = tiny if kind == "tiny" else None
    vae = AutoencoderTiny.from_pretrained(tiny) if other else AutoencoderKL.from_pretrained(checkpoints[family] / "vae")
    feeds, *expected = encoded(pipelines, vae, shape)
    checkpoint = image_graphs.checkpoint(checkpoints[family], other)
    spec = image_graphs.encoder(checkpoint)
    with torch.inference_mode():
        made = {"torch": getattr(modules, spec.module)(vae)(*map(torch.from_numpy, feeds.values())).numpy()}
    if (family, kind, shape) in TRACED:
        folder, graphs = traced(checkpoint, shape)
        graph = graphs["vae_encoder"]
        assert [t.name for t in graph.inputs] == list(feeds)
        made["graph"] = image_graphs.run(folder, graph, feeds)["image_latents"]
        made["openvino"] = on_openvino(folder / graph.file, vae, feeds)
    for latents in made.values():
        assert latents.dtype == np.float32 and latents.shape == size_of_latents(shape)
        assert all(relative_l2(latents, theirs.numpy()) <= 1e-5 for theirs in expected)
    if other is None and "graph" in made:
        without = image_graphs.run(folder, graph, {**feeds, "posterior_noise": 0 * feeds["posterior_noise"]})
        assert relative_l2(without["image_latents"], made["graph"]) > 1e-2, "the noise was to show"


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_are_scaled_as_each_pipeline_scales_them(
    pipelines: tuple[Any, Any], checkpoints: dict[str, Path], family: str, name: str
) -> None:
    """SDXL's for inpainting ignores what its one for image-to-image reads. Log-variances are beyond both limits."""
    vae = AutoencoderKL.from_pretrained(checkpoints[family] / "vae")
    vae.register_to_config(**PLAIN | CONFIGS[name])
    vae.quant_conv.bias.data[4:6] += torch.tensor([50.0, -50.0])
    feeds, *expected = encoded(pipelines, vae, SQUARE)
    read, found = [torch.from_numpy(array) for array in feeds.values()], []
    for kind, theirs in zip((image_graphs.ENCODERS[family], "VaeEncoder"), expected, strict=True):
        with torch.inference_mode():
            found.append(getattr(modules, kind)(vae)(*read))
        assert relative_l2(found[-1].numpy(), theirs.numpy()) <= 1e-6
    unlike = family == "sdxl" and {"latents_mean", "latents_std"} <= CONFIGS[name].keys()
    assert torch.equal(*found) != unlike


def external(path: Path) -> dict[str, ExternalDataInfo]:
    """Initializer → where its data is."""
    model = onnx.load(path, load_external_data=False)
    return {t.name: ExternalDataInfo(t) for t in model.graph.initializer if uses_external_data(t)}


def test_both_directions_share_their_weights(checkpoints: dict[str, Path], traced: Traced) -> None:
    checkpoint = image_graphs.checkpoint(checkpoints["sd"])
    folder, made = traced(checkpoint, SQUARE)
    assert {graph.data for graph in made.values()} == {("graphs/vae.fp32-0.data",)}
    spans = [
        (info.offset, info.length, name)
        for name, graph in made.items()
        for info in external(folder / graph.file).values()
    ]
    spans.sort()
    assert len({offset for offset, _, _ in spans}) == len(spans), "the two read no tensor together"
    assert all(0 <= after[0] - before[0] - before[1] < 64 for before, after in itertools.pairwise(spans))
    assert spans[-1][0] + spans[-1][1] == (folder / "graphs/vae.fp32-0.data").stat().st_size

    (file,) = (checkpoint.folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    names = {name: json.loads((folder / graph.names).read_text()) for name, graph in made.items()}
    used = {
        name: {parameter for parameter, place in found.items() if "initializer" in place}
        for name, found in names.items()
    }
    assert names["vae_encoder"].keys() == names["vae_decoder"].keys() == weights.keys()
    assert used["vae_encoder"] == {w for w in weights if w.startswith(("encoder.", "quant_conv."))}
    assert used["vae_decoder"] == set(weights) - used["vae_encoder"]
    held = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / made["vae_encoder"].file).graph.initializer
    }
    for parameter in used["vae_encoder"]:
        found = held[names["vae_encoder"][parameter]["initializer"]]
        np.testing.assert_array_equal(found.reshape(weights[parameter].shape), weights[parameter], parameter)


def reached(vae: Any, picture: torch.Tensor) -> dict[str, float]:
    """Module → the largest absolute value that it puts out, and the largest score of the attention."""
    found: dict[str, float] = {}
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in vae.named_modules():

        def see(_: Any, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                found[name], seen[name.rpartition(".")[2]] = float(output.abs().max()), output

        handles.append(module.register_forward_hook(see))
    with torch.inference_mode():
        vae.encode(picture)
    for handle in handles:
        handle.remove()
    scores = seen["to_q"] @ seen["to_k"].transpose(1, 2) * vae.get_submodule(ATTENTION).scale
    return found | {f"{ATTENTION}.scores": float(scores.abs().max())}


def run_strictly(path: Path, feeds: dict[str, Any]) -> np.ndarray:
    """By ONNX's own evaluator, which rounds every result in fp16; ONNX Runtime's CPU provider hides what overflows."""
    with np.errstate(all="ignore"):
        (made,) = ReferenceEvaluator(onnx.load(path)).run(None, feeds)
    return made


def test_what_overflows_fp16_is_remedied(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The stream from the first convolution on, and the scores of the attention."""
    vae = AutoencoderKL.from_pretrained(checkpoints["sdxl"] / "vae").requires_grad_(False)
    vae.encoder.conv_in.weight *= 1e6
    vae.encoder.conv_in.bias *= 1e6
    attention = vae.get_submodule(ATTENTION)
    for matrix in (attention.to_q, attention.to_k):  # one entry of every query and key is the same and large
        matrix.weight[0], matrix.bias[0] = 0, 1500
    folder = tmp_path / "vae"
    vae.save_pretrained(folder)
    checkpoint = image_graphs.checkpoint(checkpoints["sdxl"], folder)
    images = image_graphs.pictures(SQUARE)
    picture = 2 * (torch.from_numpy(images).permute(0, 3, 1, 2) / 255) - 1
    spec = image_graphs.encoder(checkpoint)
    found = remedies.remedy(spec.role, reached(vae, picture))
    assert found.precision == "fp16" and found.attention == (ATTENTION,)
    assert {"encoder.conv_in", "encoder.down_blocks.0.resnets.0", ATTENTION} <= found.exponents.keys()
    assert not any("quant_conv" in name or name.startswith("decoder") for name in found.exponents)
    assert re.fullmatch(r"rescaled by up to 2\^-\d+; fp32 attention in \S+", found.phrase)

    noise = torch.randn(size_of_latents(SQUARE), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        sample = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(7))
    expected = (sample * vae.config.scaling_factor).numpy()
    feeds, made = {"input_image": images, "posterior_noise": noise.numpy()}, {}
    for name, remedy in (("both", found), ("stream", dataclasses.replace(found, attention=()))):
        graph = image_graphs.traced(checkpoint, {name: spec}, SQUARE, tmp_path, remedy)[name]
        onnx.checker.check_model(tmp_path / graph.file, full_check=True)
        made[name] = run_strictly(tmp_path / graph.file, feeds)
    assert relative_l2(made["both"], expected) < BOUNDS["fp16"]["image_latents"]["relative_l2"]
    assert not np.isfinite(made["stream"]).all()
    names = json.loads((tmp_path / "graphs/both.names.json").read_text())
    assert names["encoder.conv_in.weight"]["factor"] <= 2.0 ** -found.exponents["encoder.conv_in"]
