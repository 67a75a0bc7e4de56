"""Engines in int8: what is measured of a graph, against diffusers' own modules, and what the backends make of it."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BundleFactory, called
from diffusers import AutoencoderKL, UNet2DConditionModel
from here import build_here
from skimage.metrics import peak_signal_noise_ratio
from test_parity import load_diffusers, theirs
from torch import nn

from turbochain.engines import calibration
from turbochain.engines.build import BuildResult
from turbochain.runtime import Bundle, BundleError, InputError, Pipeline
from turbochain.runtime.bundle import quantization
from turbochain.runtime.bundle.quantization import Quantization
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.metrics import relative_l2
from turbochain.runtime.commands.profile import profile

CALL = {"prompt": "a cat in the snow", "num_inference_steps": 2, "seed": 3}
TEXT = ["text-to-image"]
OPENVINO = {"int8": "all", "int8_error": 3, "inference_precision": "fp32"}
ONNX = {"int8": "all", "int8_error": 2}
ROLES = {"unet": UNet2DConditionModel, "vae_decoder": AutoencoderKL}


@dataclasses.dataclass
class Built:
    """A bundle with an engine in fp32 and two in int8, and what their builds returned."""

    bundle: Path
    exact: BuildResult
    openvino: BuildResult
    onnxruntime: BuildResult


@pytest.fixture(scope="module")
def built(bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory) -> Built:
    bundle = tmp_path_factory.mktemp("int8") / "int8.bundle"
    shutil.copytree(bundle_of("sd"), bundle)
    shutil.rmtree(bundle / "engines")
    how: dict[str, Any] = {"chains": TEXT, "quiet": True}
    return Built(
        bundle,
        build_here(str(bundle), backend="openvino", options={"inference_precision": "fp32"}, **how),
        build_here(str(bundle), backend="openvino", options=OPENVINO, **how),
        build_here(str(bundle), backend="onnxruntime", device="cpu", options=ONNX, **how),
    )


def description(built: Built, graph: str) -> Quantization:
    return quantization.read(Bundle.open(built.bundle), graph)


def phases(result: BuildResult) -> list[str]:
    return [phase.name for phase in result.phases]


def test_the_first_engine_in_int8_describes_the_graphs_and_others_read_that(built: Built) -> None:
    assert phases(built.openvino)[:2] == ["calibrate unet", "calibrate vae_decoder"]
    assert not [name for name in phases(built.onnxruntime) if name.startswith("calibrate")]
    manifest = json.loads((built.bundle / "bundle.json").read_text())
    assert manifest["requires"]["quantization"]
    described = {name: g["quantization"] for name, g in manifest["graphs"].items() if "quantization" in g}
    assert described == {graph: f"graphs/{graph}.int8.json" for graph in ROLES}
    Bundle.open(built.bundle).check_files(full=True)


def test_an_engine_that_was_there_stays_verified(built: Built) -> None:
    again = build_here(str(built.bundle), options={"inference_precision": "fp32"}, chains=TEXT, quiet=True)
    assert phases(again) == [] and again.engine == built.exact.engine


def test_a_copy_that_got_a_description_is_still_the_copy(
    bundle_of: BundleFactory, built: Built, tmp_path: Path
) -> None:
    """The second of two equal commands finds what the first has made, although its bundle has files of its own now."""
    copy = tmp_path / "copy.bundle"
    shutil.copytree(built.bundle, copy)
    how: dict[str, Any] = {"backend": "openvino", "options": OPENVINO, "chains": TEXT, "quiet": True}
    again = build_here(str(bundle_of("sd")), copy, **how)
    assert phases(again) == [] and again.engine == built.openvino.engine


def torch_modules(checkpoint: Path, graph: str) -> dict[str, nn.Module]:
    """Those of diffusers that int8 suits: of many channels, and of many rows."""
    kind = ROLES[graph]
    network = kind.from_pretrained(checkpoint / graph.partition("_")[0])
    inner = network.decoder if graph == "vae_decoder" else network
    found = {n: m for n, m in inner.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: m for n, m in found.items() if min(m.weight.shape[:2]) >= 8 and "time_emb" not in n}


def decode(checkpoint: Path, latents: np.ndarray, *, hook: Callable[[dict[str, nn.Module]], None]) -> np.ndarray:
    """diffusers' decoder on latents, as the graph makes levels of it."""
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    hook({name: module for name, module in vae.decoder.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)})
    with torch.inference_mode():
        made = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    return ((made / 2 + 0.5).clamp(0, 1) * 255).round().numpy()


def recorded(built: Built) -> Iterator[np.ndarray]:
    """The latents of every recorded run of the decoder."""
    opened = Bundle.open(built.bundle)
    for chain in opened.manifest.chains:
        yield from (case.tensors["next_latents"][-1] for case in reference.read(opened, chain).cases)


def ranges_of(built: Built, checkpoint: Path) -> dict[str, list[float]]:
    """Module of diffusers' decoder → least and greatest value that it reads in the recorded runs."""
    found: dict[str, list[float]] = {}

    def see(name: str, given: torch.Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(given))
        before = found.get(name, [low, high])
        found[name] = [min(low, before[0]), max(high, before[1])]

    def hook(modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            if min(module.weight.shape[:2]) >= 8:
                module.register_forward_pre_hook(lambda m, given, name=name: see(name, given[0]))

    for latents in recorded(built):
        decode(checkpoint, latents, hook=hook)
    return found


def test_ranges_are_those_of_what_diffusers_modules_read(built: Built, checkpoints: dict[str, Path]) -> None:
    expected = ranges_of(built, checkpoints["sd"])
    ranges = [product.reads.range for product in description(built, "vae_decoder").products.values()]
    ours = np.sort([[seen.low, seen.high] for seen in ranges], axis=0)
    np.testing.assert_allclose(ours, np.sort(list(expected.values()), axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("graph", ROLES)
def test_every_convolution_and_linear_layer_is_described(
    built: Built, checkpoints: dict[str, Path], graph: str
) -> None:
    assert len(description(built, graph).products) == len(torch_modules(checkpoints["sd"], graph)) > 25


def test_an_error_is_that_of_diffusers_with_one_tensor_rounded(built: Built, checkpoints: dict[str, Path]) -> None:
    """The input of the layer that costs most, which was therefore measured alone."""
    products = description(built, "vae_decoder").products.values()
    worst = max(products, key=lambda product: product.reads.error).reads
    ranges = ranges_of(built, checkpoints["sd"])
    (name,) = [n for n, ends in ranges.items() if np.allclose(ends, [worst.range.low, worst.range.high], rtol=1e-4)]
    step, zero = worst.range.step, worst.range.zero

    def round_input(modules: dict[str, nn.Module]) -> None:
        modules[name].register_forward_pre_hook(
            lambda m, given: (torch.fake_quantize_per_tensor_affine(given[0], step, zero, 0, 255),)
        )

    latents = next(recorded(built))
    exact = decode(checkpoints["sd"], latents, hook=lambda modules: None)
    rounded = decode(checkpoints["sd"], latents, hook=round_input)
    assert worst.error == pytest.approx(relative_l2(rounded, exact), rel=0.05)


def test_what_matters_is_found_among_many() -> None:
    """Of errors that add up as squares: three of 200 are large."""
    own = np.full(200, 1e-3)
    own[[17, 18, 150]] = [0.1, 0.05, 0.02]
    calls = []

    def error(rounded: Any) -> float:
        calls.append(1)
        return float(np.sqrt((own[list(rounded)] ** 2).sum()))

    found = calibration.share(error, [range(100), range(100, 200)])
    assert [found[i] for i in (17, 18, 150)] == pytest.approx([0.1, 0.05, 0.02], rel=1e-3)
    assert {*found} == {*range(200)} and len(calls) <= 2 + 2 * calibration.SPLITS
    assert sum(value**2 for value in found.values()) == pytest.approx((own**2).sum(), rel=1e-3)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_picture_is_within_the_bounds_of_int8(built: Built, checkpoints: dict[str, Path], backend: str) -> None:
    made: BuildResult = getattr(built, backend)
    assert {made.precision[graph] for graph in ROLES} == {"int8"} and made.precision["text_encoder"] == "fp32"
    held = {(c.stage, c.metric): c.bound for c in made.checks[TEXT[0]]}
    assert held["image", "psnr"] == 30 and held["image", "ssim"] == 0.9
    assert held["vae_decoder", "psnr"] == 30 and "relative_l2" in dict(k[::-1] for k in held if k[0] == "unet")
    with Pipeline.load(built.bundle, engine=made.engine, backend=backend) as pipe:
        drawn = pipe(**CALL, output_type="uint8").images
    (expected,) = theirs(load_diffusers(checkpoints["sd"]), CALL)
    assert 28 <= peak_signal_noise_ratio(expected, drawn[0], data_range=255) < 60  # another prompt than those recorded


def test_openvino_computes_in_int8_what_is_kept(built: Built) -> None:
    bundle = Bundle.open(built.bundle)
    (made,) = (engine for name, engine in bundle.engines().items() if name == built.openvino.engine)
    operators = profile(built.bundle, engine=built.openvino.engine, runs=1)
    for graph in ROLES:
        kept = quantization.kept(bundle, graph, "openvino", made.options)
        products = [o for o in operators[graph] if o.kind.startswith(("Convolution ", "FullyConnected", "MatMul"))]
        eight_bits = sum(o.count for o in products if o.kind.lower().endswith("_i8"))  # as OpenVINO names them
        merged = 3 if graph == "vae_decoder" else 0  # with their upsampling: transposed convolutions, not in int8
        assert len(kept) - merged <= eight_bits <= len(kept) and len(kept) > 20, graph
    assert not [o.kind for o in operators["text_encoder"] if o.kind.lower().endswith("_i8")]


def test_onnx_runtime_computes_in_int8_what_is_kept(built: Built) -> None:
    bundle = Bundle.open(built.bundle)
    (made,) = (engine for name, engine in bundle.engines().items() if name == built.onnxruntime.engine)
    operators = profile(built.bundle, engine=built.onnxruntime.engine, runs=1)
    for graph in ROLES:
        kept = quantization.kept(bundle, graph, "onnxruntime", made.options)
        kinds = {kind: sum(o.count for o in operators[graph] if o.kind == kind) for kind in QUANTIZED}
        assert kinds["QLinearConv"] == sum("conv" in name for name in kept), graph
        assert sum(kinds.values()) == len(kept) > 20, graph


QUANTIZED = ("QLinearConv", "MatMulIntegerToFloat")


def test_inspect_tells_what_is_in_int8(built: Built) -> None:
    said = called("turbochain", "inspect", built.bundle).stdout
    kept = len(description(built, "unet").kept(OPENVINO["int8_error"] / 100))  # type: ignore[operator]
    assert f"unet in int8: {kept} of {len(description(built, 'unet').products)} layers" in said
    assert f"engine {built.openvino.engine}" in said and "int8=all" in said


def test_a_description_that_was_changed_is_refused(built: Built, tmp_path: Path) -> None:
    bundle = tmp_path / "changed.bundle"
    shutil.copytree(built.bundle, bundle)
    path = bundle / "graphs/unet.int8.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(BundleError, match=r"'graphs/unet\.int8\.json'"):
        Pipeline.load(bundle, engine=built.openvino.engine)


def test_a_bundle_that_cannot_be_written_is_not_described(
    bundle_of: BundleFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "read-only.bundle"
    shutil.copytree(bundle_of("sd"), bundle)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written: copy it"):
        build_here(str(bundle), backend="openvino", options=OPENVINO, chains=TEXT, quiet=True)


def test_int8_without_a_description_says_what_writes_it(bundle_of: BundleFactory) -> None:
    with pytest.raises(BundleError, match=r"build-engine .* -O int8=all"):
        quantization.read(Bundle.open(bundle_of("sd")), "unet")
