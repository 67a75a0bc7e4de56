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
from conftest import ON, BundleFactory, called
from diffusers import AutoencoderKL, UNet2DConditionModel
from here import build_here
from second_chain import edit_json, record
from skimage.metrics import peak_signal_noise_ratio
from test_parity import load_diffusers, theirs
from torch import nn

from turbochain.engines import calibration
from turbochain.engines.backends import int8
from turbochain.engines.build import BuildResult
from turbochain.runtime import Bundle, BundleError, InputError, Pipeline, VerificationError, selection
from turbochain.runtime.backends import cpus, openvino, openvino_int8
from turbochain.runtime.bundle import quantization
from turbochain.runtime.bundle.manifest import Engine
from turbochain.runtime.bundle.quantization import Quantization
from turbochain.runtime.chain.slots import DOWN, UP
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.metrics import relative_l2
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.commands.profile import profile

CALL = {"prompt": "a cat in the snow", "num_inference_steps": 2, "seed": 3}
TEXT = ["text-to-image"]
OPENVINO = {"int8": "all", "inference_precision": "fp32"}
ONNX = {"int8": "all"}
ROLES = {"unet": UNet2DConditionModel, "vae_decoder": AutoencoderKL}


@dataclasses.dataclass
class Built:
    """A bundle with an engine in fp32, which it had, and two in int8, and what their builds returned."""

    bundle: Path
    exact: str
    openvino: BuildResult
    onnxruntime: BuildResult


@pytest.fixture(scope="module")
def built(bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory) -> Built:
    bundle = tmp_path_factory.mktemp("int8") / "int8.bundle"
    shutil.copytree(bundle_of("sd"), bundle)
    (exact,) = Bundle.open(bundle).engines()
    how: dict[str, Any] = {"chains": TEXT, "quiet": True}
    in_openvino = build_here(str(bundle), backend="openvino", options=OPENVINO, **how)
    return Built(bundle, exact, in_openvino, build_here(str(bundle), options=ONNX, **how, **ON))


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
    again = build_here(str(built.bundle), quiet=True, **ON)
    assert phases(again) == [] and again.engine == built.exact


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


def test_ranges_are_four_times_what_diffusers_modules_read(built: Built, checkpoints: dict[str, Path]) -> None:
    expected = ranges_of(built, checkpoints["sd"])
    ranges = [layer.reads.range for layer in description(built, "vae_decoder").layers.values()]
    ours = np.sort([[seen.low, seen.high] for seen in ranges], axis=0)
    np.testing.assert_allclose(ours, 4 * np.sort(list(expected.values()), axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("graph", ROLES)
def test_every_convolution_and_linear_layer_is_described(
    built: Built, checkpoints: dict[str, Path], graph: str
) -> None:
    assert len(description(built, graph).layers) == len(torch_modules(checkpoints["sd"], graph)) > 25


def test_an_error_is_that_of_diffusers_with_one_tensor_rounded(built: Built, checkpoints: dict[str, Path]) -> None:
    """The input of the layer that costs most, which was therefore measured alone."""
    worst = max((layer.reads for layer in description(built, "vae_decoder").layers.values()), key=lambda r: r.error)
    ranges = ranges_of(built, checkpoints["sd"])
    (name,) = [
        n for n, ends in ranges.items() if np.allclose(ends, [worst.range.low / 4, worst.range.high / 4], rtol=1e-4)
    ]
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
    assert held["image", "psnr"] == held["vae_decoder", "psnr"] == 30 and held["image", "ssim"] == 0.9
    assert "relative_l2" in dict(k[::-1] for k in held if k[0] == "unet")
    with Pipeline.load(built.bundle, engine=made.engine, backend=backend) as pipe:
        drawn = pipe(**CALL, output_type="uint8").images
    (expected,) = theirs(load_diffusers(checkpoints["sd"]), CALL)
    assert 30 <= peak_signal_noise_ratio(expected, drawn[0], data_range=255) < 60  # another prompt than those recorded


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


@pytest.mark.full
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
    kept, of = built.openvino.int8["unet"]
    assert f"unet in int8: {kept} of {of} layers" in said and of == len(description(built, "unet").layers) >= kept
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


def test_an_engine_is_of_its_description_alone(built: Built, tmp_path: Path) -> None:
    """Other figures, although the manifest says so, make another engine; one that is not in int8 stays."""
    bundle = tmp_path / "other.bundle"
    shutil.copytree(built.bundle, bundle)
    describe(bundle, "unet", lambda layers: next(iter(layers.values()))["reads"].update(error=1.0))
    for engine in (built.openvino.engine, built.onnxruntime.engine):
        with pytest.raises(BundleError, match="built from other graphs"):
            Pipeline.load(bundle, engine=engine)
    with Pipeline.load(bundle, engine=built.exact) as pipe:
        assert pipe.engine_name == built.exact


def describe(bundle: Path, graph: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the layers of a graph's description, and record its new hash."""
    file = f"graphs/{graph}.int8.json"
    edit_json(bundle / file, lambda description: edit(description["layers"]))
    record(bundle, file)


def spoil(layers: dict[str, Any], error: float) -> list[str]:
    """Let the ten layers that multiply most read zeros alone, which is said to add so much; return their names."""
    spoilt = sorted(layers, key=lambda name: layers[name]["macs"])[-10:]
    for reads in (layers[name]["reads"] for name in spoilt):
        reads.update(error=error, range={end: 1000 * value for end, value in reads["range"].items()})
    return spoilt


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Path:
    """A copy of the bundle without engines."""
    path = tmp_path / "copy.bundle"
    shutil.copytree(built.bundle, path, ignore=shutil.ignore_patterns("engines"))
    return path


def build_vae(bundle: Path, errors: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> BuildResult:
    """Build OpenVINO's engine with the decoder in int8; `errors` are tried in this order."""
    monkeypatch.setattr(int8, "ERRORS", errors)
    return build_here(str(bundle), backend="openvino", options={**OPENVINO, "int8": "vae"}, chains=TEXT, quiet=True)


def test_layers_that_spoil_the_picture_are_given_back(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt: list[str] = []
    describe(copy, "vae_decoder", lambda layers: spoilt.extend(spoil(layers, 0.012)))
    made = build_vae(copy, (4.0, 1.0), monkeypatch)
    bundle = Bundle.open(copy)
    engine = bundle.engines()[made.engine]
    assert isinstance(engine, Engine) and engine.settled["int8_error"] == 1.0
    kept = quantization.kept(bundle, "vae_decoder", "openvino", engine.options)
    assert not kept.keys() & set(spoilt) and len(kept) == made.int8["vae_decoder"][0] > 10
    assert phases(made)[-2:] == ["verify text-to-image"] * 2


def test_a_picture_that_stays_spoilt_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(copy, "vae_decoder", lambda layers: spoil(layers, 0.0))
    with pytest.raises(VerificationError, match=r"image: psnr.*Fewer layers in int8 were tried: leave the option out"):
        build_vae(copy, (4.0,), monkeypatch)
    assert not (copy / "engines").exists()


def test_no_layer_in_int8_is_no_engine_in_int8(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerificationError, match="no layer of vae_decoder adds so little in int8"):
        build_vae(copy, (1e-9,), monkeypatch)


def test_weights_of_8_bits_need_a_cpu_that_sums_them(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(built.bundle)
    engine, chain = bundle.engines()[built.openvino.engine], bundle.open_chain()
    assert isinstance(engine, Engine)
    eight = dataclasses.replace(engine, settled={**engine.settled, "weight_bits": 8})
    for vnni, expected in ((True, None), (False, "no VNNI")):
        monkeypatch.setattr(cpus, "has_vnni", lambda vnni=vnni: vnni)
        reason = selection.misfit(chain, eight)
        assert reason is None if expected is None else expected in str(reason)
    assert selection.misfit(chain, dataclasses.replace(engine, settled={**engine.settled, "weight_bits": 7})) is None


def test_a_graph_with_slots_is_measured_with_zeros_there(slotted: Path) -> None:
    bundle = Bundle.open(slotted)
    (slots,) = (name for name, graph in bundle.manifest.graphs.items() if graph.slots and graph.role == "unet")
    plain, with_slots = (list(calibration.recorded(bundle, name)) for name in ("unet", slots))
    for one, other in zip(plain, with_slots, strict=True):
        assert one.weight == other.weight > 0
        assert not other.feeds[DOWN].any() and not other.feeds[UP].any()
        for name in one.feeds.keys() & other.feeds.keys():
            assert np.array_equal(one.feeds[name], other.feeds[name])
    read = [openvino.core().read_model(bundle.path / f"graphs/{name}.onnx") for name in ("unet", slots)]
    assert [len(openvino_int8.layers(model)) for model in read] == [len(openvino_int8.layers(read[0]))] * 2


def test_an_error_of_a_prediction_counts_as_one_of_the_latents(sd: Path) -> None:
    """Against the recorded scheduler's own arithmetic: what a prediction that is off leaves in the latents."""
    bundle = Bundle.open(sd)
    chain = bundle.open_chain()
    case = reference.read(bundle, chain.name).cases[0]
    run = next(calibration.recorded(bundle, "unet"))
    recorded, off = Recorded(chain, case), dict(case.tensors)
    off["prediction"] = off["prediction"] * 1.01
    error = relative_l2(Recorded(chain, dataclasses.replace(case, tensors=off)).walked[0, 0], recorded.walked[0, 0])
    assert 0.01 * run.weight == pytest.approx(error, rel=1e-3)


def test_it_is_refused_where_a_backend_has_none_before_anything_is_measured(bundle_of: BundleFactory) -> None:
    with pytest.raises(InputError, match="onnxruntime has it on a CPU, of graphs in fp32, and unet is in fp16"):
        build_here(str(bundle_of("sd", "fp16")), backend="onnxruntime", device="cpu", options=ONNX, quiet=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fp16", "three pictures of SDXL", "slots", "ControlNet"])
def test_other_bundles(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every chain of a bundle stays in the bounds of int8, and its UNets have most of their layers in int8."""
    bundle_of: BundleFactory = request.getfixturevalue("bundle_of")
    shared = {
        "fp16": lambda: bundle_of("sd", "fp16"),
        "three pictures of SDXL": lambda: bundle_of("sdxl"),
        "slots": lambda: request.getfixturevalue("slotted"),
        "ControlNet": lambda: request.getfixturevalue("controlled"),
    }
    bundle = tmp_path / "other.bundle"
    shutil.copytree(shared[kind](), bundle, ignore=shutil.ignore_patterns("engines"))
    made = build_here(str(bundle), backend="openvino", options={**OPENVINO, "inference_precision": "auto"}, quiet=True)
    assert made.checks.keys() == Bundle.open(bundle).manifest.chains.keys()
    for graph, (kept, of) in made.int8.items():
        assert kept > of / 2 > 10, (graph, kept, of)
    assert {"unet", "vae_decoder"} <= made.int8.keys()
    assert (kind == "slots") == any("lora" in graph for graph in made.int8)
