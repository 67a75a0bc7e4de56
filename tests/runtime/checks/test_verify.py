"""`verify` passes what is right and refuses what is wrong, and says which stage and by how much."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import FAMILIES, ROOT, BundleFactory, called, reseal
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from turbochain.runtime import Bundle, BundleError, Pipeline, VerificationError, selection
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Check, Graph
from turbochain.runtime.checks import bounds, metrics, reference, verify

Copy = Callable[[Path], Path]
Change = Callable[[Path, Path], None]  # a bundle, the checkpoint that it was made of
Arrays = dict[str, np.ndarray]
Loaded = tuple[Bundle, Executor]
TABLES = "tables/text-to-image.safetensors"
STEPS = (1, 2, 3, 4)


def checks_of(path: Path, loaded: Loaded | None = None) -> list[Check]:
    """Everything hashed, then every figure; by the executor `loaded` if it has the very graphs of the bundle."""
    bundle = Bundle.open(path)
    bundle.check_files(full=True)
    chain = bundle.open_chain()
    found = selection.select(chain)
    if loaded and all(loaded[0].graph_digest(graph) == bundle.graph_digest(graph) for graph in chain.graphs):
        return verify.verify(chain, loaded[1], verify.precisions(chain, found))
    executor = selection.open_executor(bundle, found)
    try:
        executor.load(chain.graphs)
        return verify.verify(chain, executor, verify.precisions(chain, found))
    finally:
        executor.close()


@pytest.fixture(scope="module")
def loaded(bundle_of: BundleFactory) -> Iterator[Callable[[str], Loaded]]:
    """A family → its bundle, and an executor with the graphs of text-to-image, which most changes leave as they are."""
    with ExitStack() as stack:

        @functools.cache
        def load(family: str) -> Loaded:
            bundle = Bundle.open(bundle_of(family))
            chain = bundle.open_chain()
            executor = selection.open_executor(bundle, selection.select(chain))
            stack.callback(executor.close)
            executor.load(chain.graphs)
            return bundle, executor

        yield load


def failed(checks: list[Check]) -> set[str]:
    return {c.stage for c in checks if not c.passed}


def in_graph(name: str, change: Callable[[Any], None]) -> Change:
    """A change of one ONNX graph."""

    def apply(path: Path, _: Path = Path()) -> None:
        file = path / "graphs" / f"{name}.onnx"
        proto = onnx.load(file, load_external_data=False)
        change(proto.graph)
        file.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(file)

    return apply


def in_tables(change: Callable[..., None]) -> Change:
    """A change of the arrays of the table file, which may read the checkpoint."""

    def apply(path: Path, checkpoint: Path = Path()) -> None:
        arrays = load_file(path / TABLES)
        change(arrays, checkpoint)
        save_file(arrays, path / TABLES)

    return apply


def in_reference(path: Path, change: Callable[[Arrays, list[dict[str, Any]]], object]) -> None:
    """Change what was recorded, and the cases that say of what; then describe the files anew."""
    file = path / "reference.safetensors"
    with safe_open(file, "numpy") as opened:
        cases = json.loads(opened.metadata()["cases"])
    arrays = load_file(file)
    change(arrays, cases)
    save_file(arrays, file, {"cases": json.dumps(cases)})
    reseal(path)


FEW = (("2", []), ("1", ["guidance"]))
"""Table and modes of two cases that run every graph of text-to-image, one of them with a row after the first."""


@pytest.fixture
def few(request: pytest.FixtureRequest, copy_of: Copy) -> Callable[[str], Path]:
    """A family → a copy of its bundle with the cases `FEW` alone, which are verified in half the time."""

    def rename(_: Arrays, cases: list[dict[str, Any]]) -> None:
        others = [case for case in cases if (case["table"], case["modes"]) not in FEW]
        assert len(others) == len(cases) - len(FEW)
        for case in others:
            case["chain"] = "another"

    def make(family: str) -> Path:
        path = copy_of(request.getfixturevalue(family))
        in_reference(path, rename)
        return path

    return make


def in_rows(field: str, change: Callable[[np.ndarray], Any], *, at_step: int = 0) -> Change:
    """A change of one step's row in every table that has it."""

    def edit(arrays: Arrays, _: Path) -> None:
        for steps in STEPS[at_step:]:
            rows = arrays[f"{steps}/{field}"]
            rows[at_step] = change(rows[at_step])

    return in_tables(edit)


def scaled(field: str, factor: float) -> Change:
    """A row, a column or a number, multiplied."""
    if "/" not in field and field != "init_noise_sigma":
        return in_rows(field, lambda row: row * factor)
    names = [field] if "/" in field else [f"{steps}/{field}" for steps in STEPS]
    return in_tables(lambda arrays, _: arrays.update({n: np.asarray(arrays[n] * np.float32(factor)) for n in names}))


def then(graph: Any, output: str, operator: str, constant: Any, **attributes: Any) -> None:
    """Let `operator(output, constant)` take the place of a graph's output."""
    producer = next(n for n in graph.node if output in n.output)
    producer.output[list(producer.output).index(output)] = "right"
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constant), "wrong"))
    graph.node.append(onnx.helper.make_node(operator, ["right", "wrong"], [output], **attributes))


def floor_for_round(graph: Any) -> None:
    (node,) = (n for n in graph.node if n.op_type == "Round")
    node.op_type = "Floor"


def no_final_norm(graph: Any) -> None:
    (node,) = (n for n in graph.node if "prompt_embeds" in n.output)
    assert node.op_type == "LayerNormalization"
    node.CopyFrom(onnx.helper.make_node("Identity", [node.input[0]], list(node.output)))


def hidden_state_before(graph: Any) -> None:
    """The text encoder's last hidden state but one, normed: what diffusers reads with `clip_skip`."""
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    *_, first_of_last_layer, _, final = norms
    assert "prompt_embeds" in final.output
    final.input[0] = first_of_last_layer.input[0]


def blind_to_pooled(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = ["zeroed" if name == "pooled_prompt_embeds" else name for name in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    graph.node.insert(0, onnx.helper.make_node("Mul", ["pooled_prompt_embeds", "zero"], ["zeroed"]))


def resnets(unet: UNet2DConditionModel) -> list[ResnetBlock2D]:
    return [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]


def column_of(checkpoint: Path, timestep: float) -> tuple[str, np.ndarray]:
    """The column that depends on the timestep [1, n], by diffusers' own modules, and its name."""
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    with torch.inference_mode():
        embedding = unet.time_embedding(unet.get_time_embed(torch.zeros(1), torch.tensor(timestep)))
        if unet.config.addition_embed_type == "text_time":
            return "columns/time_embeds", embedding.numpy()
        projected = [resnet.time_emb_proj(resnet.nonlinearity(embedding)) for resnet in resnets(unet)]
    return "columns/time_projections", torch.cat(projected, dim=-1).numpy()


def timestep(offset: int, *, at_step: int = 0) -> Change:
    """The columns of another timestep in that step's row of every table."""

    def edit(arrays: Arrays, checkpoint: Path) -> None:
        for place in {int(arrays[f"{steps}/index"][at_step]) for steps in STEPS[at_step:]}:
            time = float(arrays["timesteps"][place])
            name, right = column_of(checkpoint, time)
            np.testing.assert_allclose(arrays[name][place], right, rtol=1e-5, atol=1e-5)
            arrays[name][place] = column_of(checkpoint, time + offset)[1]

    return in_tables(edit)


def another_index(arrays: Arrays, _: Path) -> None:
    for steps in STEPS[1:]:
        index = arrays[f"{steps}/index"]
        index[:2] = index[1::-1]


def resnets_exchanged(arrays: Arrays, checkpoint: Path) -> None:
    """The columns of two neighbouring ResNets, which have as many channels each."""
    widths = [r.time_emb_proj.out_features for r in resnets(UNet2DConditionModel.from_pretrained(checkpoint / "unet"))]
    first = next(i for i, width in enumerate(widths) if width == widths[i + 1])
    start, column = sum(widths[:first]), arrays["columns/time_projections"]
    both = slice(start, start + 2 * widths[first])
    column[..., both] = np.roll(column[..., both], widths[first], axis=-1)


def draws_exchanged(path: Path, _: Path) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["chains"]["text-to-image"]["draws"].reverse()
    (path / "bundle.json").write_text(json.dumps(manifest))


def coefficients_exchanged(graph: Any) -> None:
    for node in graph.node:
        node.input[:] = [{"v": "w", "w": "v"}.get(name, name) for name in node.input]


def predictions_exchanged(graph: Any) -> None:
    other = {"prediction": "negative_prediction", "negative_prediction": "prediction"}
    for node in graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def pooled_zeroed(graph: Any) -> None:
    then(graph, "pooled_prompt_embeds", "Mul", np.float32(0))


def channels_swapped(graph: Any) -> None:
    then(graph, "image", "Gather", np.int64([2, 1, 0]), axis=3)


def not_a_number(graph: Any) -> None:
    then(graph, "prediction", "Add", np.float32("nan"))


TIME_HIT, ROW_HIT = {"schedule", "unet", "image"}, {"schedule", "step", "image"}
MUTATIONS: dict[str, tuple[str, Change, set[str]]] = {
    "no final norm": ("sd", in_graph("text_encoder", no_final_norm), {"text_encoder", "image"}),
    "another hidden state": ("sd", in_graph("text_encoder", hidden_state_before), {"text_encoder", "image"}),
    "timestep + 1": ("sd", timestep(1, at_step=1), TIME_HIT),
    "timestep - 1": ("sdxl", timestep(-1), TIME_HIT),
    "another row's timestep": ("sd", in_tables(another_index), TIME_HIT),
    "w = 0": ("sdxl", in_rows("w", lambda row: 0), ROW_HIT),
    "noise not drawn": ("sdxl", in_rows("draws_noise", lambda row: False), {"image"}),
    "draws exchanged": ("sdxl", draws_exchanged, {"image"}),
    "pooled embeds zeroed": ("sdxl", in_graph("text_encoder_2", pooled_zeroed), {"text_encoder_2", "image"}),
    "pooled embeds not read": ("sdxl", in_graph("unet", blind_to_pooled), {"unet", "image"}),
    "floor for round": ("sd", in_graph("vae_decoder", floor_for_round), {"vae_decoder", "image"}),
    "channels swapped": ("sdxl", in_graph("vae_decoder", channels_swapped), {"vae_decoder", "image"}),
    "time projections": ("sd", scaled("columns/time_projections", 1.01), TIME_HIT),
    "ResNets exchanged": ("sd", in_tables(resnets_exchanged), TIME_HIT),
    "time embedding": ("sdxl", scaled("columns/time_embeds", 1.01), TIME_HIT),
    "time ids": ("sdxl", scaled("constants/time_ids_embeds", 1.05), {"unet", "image"}),
    "NaN": ("sd", in_graph("unet", not_a_number), {"unet", "image"}),
    "v and w exchanged": ("sdxl", in_graph("step", coefficients_exchanged), {"step", "image"}),
    "v and w exchanged with guidance": (
        "sdxl",
        in_graph("step+guidance", coefficients_exchanged),
        {"step+guidance", "image"},
    ),
    "guidance from the wrong prompt": (
        "sd",
        in_graph("step+guidance", predictions_exchanged),
        {"step+guidance", "image"},
    ),
    "m": ("sd", scaled("m", 1.005), ROW_HIT | {"step+guidance"}),
    "v": ("sdxl", scaled("v", 0.995), ROW_HIT | {"step+guidance"}),
    "w": ("sdxl", scaled("w", 1.02), ROW_HIT),
    "input_scale": ("sd", scaled("input_scale", 1.02), {"unet", "image"}),
    "init_noise_sigma": ("sd", scaled("init_noise_sigma", 1.01), {"image"}),
}
"""What is wrong → family, change, and the stages that must be named."""


LIKE_OTHERS = dict.fromkeys(("timestep - 1", "w = 0", "pooled embeds zeroed"), pytest.mark.full)


@pytest.mark.parametrize("name", [pytest.param(name, marks=LIKE_OTHERS.get(name, ())) for name in MUTATIONS])
def test_what_is_wrong_is_refused_by_name(
    name: str, checkpoints: dict[str, Path], few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    family, change, stages_hit = MUTATIONS[name]
    path = few(family)
    change(path, checkpoints[family])
    reseal(path)
    checks = checks_of(path, loaded(family))
    assert failed(checks) == stages_hit
    with pytest.raises(VerificationError) as error:
        verify.require(checks)
    assert all(f"{stage}: " in str(error.value) for stage in stages_hit)


@pytest.mark.parametrize("change", [None, coefficients_exchanged, predictions_exchanged])
def test_a_guided_step_that_was_not_recorded_is_checked(
    change: Callable[[Any], None] | None, few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    """As that of a further size, whose one case has no guidance."""
    path = few("sdxl")
    in_reference(path, lambda _, cases: [c.update(chain="another") for c in cases if c["modes"]])
    if change:
        in_graph("step+guidance", change)(path)
        reseal(path)
    checks = checks_of(path, loaded("sdxl"))
    assert failed(checks) == ({"step+guidance"} if change else set())
    assert "step+guidance" in {check.stage for check in checks}


def test_a_figure_above_its_bound_is_shown_though_a_larger_one_is_allowed(
    few: Callable[[str], Path], loaded: Callable[[str], Loaded]
) -> None:
    """A step may be off by 1e-4, and a column of the time by 1e-5."""
    path = few("sd")
    scaled("m", 1 + 5e-5)(path, Path())
    reseal(path)
    assert "schedule" not in failed(checks_of(path, loaded("sd")))
    scaled("columns/time_projections", 1 + 2e-5)(path, Path())
    reseal(path)
    (check,) = (c for c in checks_of(path, loaded("sd")) if c.stage == "schedule")
    assert not check.passed and check.value == pytest.approx(2e-5, rel=0.1) and check.bound == 1e-5


def test_one_token_id_that_differs_is_refused(few: Callable[[str], Path], loaded: Callable[[str], Loaded]) -> None:
    path = few("sd")
    in_reference(path, lambda arrays, _: arrays["1/input_ids"].__setitem__((0, 1), 0))
    assert "ids" in failed(checks_of(path, loaded("sd")))


def test_a_reference_without_a_case_verifies_nothing(sd: Path, copy_of: Copy) -> None:
    path = copy_of(sd)
    in_reference(path, lambda _, cases: [case.update(chain="another") for case in cases])
    with pytest.raises(BundleError, match="has no case of the chain text-to-image to check against"):
        checks_of(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resealed_copy_passes(family: str, few: Callable[[str], Path]) -> None:
    """So it is the change that the tests above refuse."""
    path = few(family)
    in_graph("vae_decoder", lambda graph: None)(path)
    in_tables(lambda arrays, _: None)(path, Path())
    reseal(path)
    verify.require(checks_of(path))


@pytest.mark.parametrize(
    ("family", "precision"),
    [("sd", "fp32"), ("sd", "fp16"), *(pytest.param("sdxl", of, marks=pytest.mark.full) for of in ("fp32", "fp16"))],
)
def test_good_bundles_pass_every_bound_of_the_design(family: str, precision: str, bundle_of: BundleFactory) -> None:
    path = bundle_of(family, precision)
    done = called("turbochain", "verify", path, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["passed"] is True
    assert [*answer["checks"]] == ["text-to-image", "image-to-image"]
    for chain, checks in answer["checks"].items():
        assert all(c["passed"] for c in checks)
        _assert_bounds(Bundle.open(path).open_chain(chain).graphs, checks, precision)


def _assert_bounds(graphs: dict[str, Graph], checks: list[dict[str, Any]], precision: str) -> None:
    bounds = {(c["stage"], c["metric"]): c["bound"] for c in checks}
    assert {stage for stage, _ in bounds} == {*graphs, "ids", "schedule", "image"}
    text = {"max_abs": 1e-3} if precision == "fp32" else {"cosine": 0.9999}
    assert {m: b for (s, m), b in bounds.items() if s == "text_encoder"} == text
    assert bounds["unet", "relative_l2"] == {"fp32": 1e-4, "fp16": 1e-2}[precision]
    for sampler in {"step", "step+guidance", "start"} & {*graphs}:
        assert bounds[sampler, "relative_l2"] == 1e-4 and graphs[sampler].precision == "fp32"
    if "vae_encoder" in graphs:
        latents = {"fp32": 1e-4, "fp16": 1e-2}[graphs["vae_encoder"].precision]
        assert bounds["vae_encoder", "relative_l2"] == latents
    same = {"max_abs": 1, "fraction_differing": 1e-3}
    decoder = same if graphs["vae_decoder"].precision == "fp32" else {"psnr": 45}
    assert {m: b for (s, m), b in bounds.items() if s == "vae_decoder"} == decoder
    image = same if precision == "fp32" else {"psnr": 38, "ssim": 0.98}
    assert {m: b for (s, m), b in bounds.items() if s == "image"} == image


PAGE = (ROOT / "runtime/checks/README.md").read_text()
NUMBER = re.compile(r"([≤≥]) ([\d.e-]+)(%?)")


def test_the_bounds_are_those_of_the_page() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    start = rows.index(["", "fp32", "fp16", "bf16"]) + 2
    for what, fp32, fp16, last in rows[start : start + 5]:
        bf16, _, int8 = last.partition("int8")
        said = {"fp32": fp32, "fp16": fp16, "bf16": fp16 if bf16.startswith("the same") else bf16, "int8": int8}
        for precision, text in said.items():
            stated = [(sign, float(number) / (100 if part else 1)) for sign, number, part in NUMBER.findall(text)]
            for kind in what.split(" of ")[0].split(", "):
                held = bounds.BOUNDS[precision].get(kind, {}).items()
                assert stated == [("≥" if m in bounds.AT_LEAST else "≤", b) for m, b in held], (kind, precision)
    (tiny,) = re.findall(r"AutoencoderTiny ([\d.]+)\)", PAGE)
    for precision, held in bounds.BOUNDS.items():
        own = {"psnr": float(tiny)} if precision == "bf16" else held["picture"]
        assert bounds.of_stage(precision, "picture", "AutoencoderTiny") == own
        assert bounds.of_stage(precision, "picture", "AutoencoderKL") == held["picture"]
    _, state, *others = rows[start + 5]
    assert [float(number) for _, number, _ in NUMBER.findall(state)] == [
        *bounds.STATE.values(),
        *bounds.COLUMN.values(),
    ]
    assert others == ["the same"] * 2 and bounds.of_stage("bf16", "state", "") == bounds.STATE
    assert "If predictions are in int8, the image has the bounds of bf16" in PAGE
    assert bounds.of_image("int8", {}, "int8") == bounds.BOUNDS["bf16"]["image"]
    assert bounds.of_image("int8", {}, "bf16") == bounds.BOUNDS["int8"]["image"]


def test_the_figure_of_several_pictures_is_that_of_the_worst(bundle_of: BundleFactory) -> None:
    path = bundle_of("sd", "fp16")
    (shown,) = (c for c in checks_of(path) if (c.stage, c.metric) == ("image", "psnr"))
    found = []
    with Pipeline.load(path) as pipe:
        for case in reference.read(pipe.bundle, "text-to-image").cases:
            steps = pipe.bundle.open_chain().chain.tables[case.table].steps
            scale = float(case.tensors["guidance_scale"][0]) if case.modes else 0.0
            call = {"prompt": case.prompt, "seed": case.seed, "num_inference_steps": steps, "guidance_scale": scale}
            picture = pipe(**call, output_type="uint8").images
            found.append(peak_signal_noise_ratio(case.tensors["image"], picture, data_range=255))
    assert shown.value == pytest.approx(min(found), rel=1e-6) and max(found) > min(found) + 0.1


def test_the_command_fails_with_stage_figure_and_bound(sd: Path, copy_of: Copy) -> None:
    path = copy_of(sd)
    in_graph("vae_decoder", channels_swapped)(path)
    reseal(path)
    reference = load_file(sd / "reference.safetensors")
    first = [k for k in reference if k.endswith("/image") and k.replace("image", "start_noise") not in reference]
    pictures = [reference[name].astype(float) for name in first]  # of the first chain, which is told first
    expected = max(np.abs(p - p[..., ::-1]).max() for p in pictures)

    done = called("turbochain", "verify", path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^vae_decoder +max_abs .* FAILED$", done.stdout, re.M)
    figure = re.search(r"vae_decoder: max_abs is ([\d.e+]+), the bound is ≤ 1;", done.stderr)
    assert figure and abs(float(figure[1]) - expected) <= 1

    done = called("turbochain", "verify", path, "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["passed"] is False
    for chain in ("text-to-image", "image-to-image"):
        assert {c["stage"] for c in answer["checks"][chain] if not c["passed"]} == {"vae_decoder", "image"}
    assert "vae_decoder" in done.stderr


@pytest.mark.parametrize("name", ["graphs/unet.fp32-0.data", "reference.safetensors", TABLES])
def test_a_flipped_bit_is_bad_input_not_a_wrong_result(sd: Path, copy_of: Copy, name: str) -> None:
    file = copy_of(sd) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = called("turbochain", "verify", file.parents[name.count("/")])
    assert done.returncode == 2
    assert name in done.stderr


def test_a_verification_asks_no_stamp(sd: Path, copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp that lies about a large file shows who is asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "SETTLED", 0)  # a stamp need not wait for the file to be two seconds old
    path = copy_of(sd)
    with (path / "large").open("wb") as file:
        file.truncate(hashing.CHUNK + 1)
    record, lie = hashing.describe(path / "large"), "f" * 64
    hashing.check(path, "large", record, full=False)
    (stamp,) = (tmp_path / "cache/turbochain/hashes").iterdir()
    stamp.write_text(stamp.read_text().replace(record.sha256, lie))
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"]["large"] = {"size": record.size, "sha256": lie}
    (path / "bundle.json").write_text(json.dumps(manifest))
    Bundle.open(path).check_files()
    with pytest.raises(BundleError, match="'large' is damaged"):
        verify.verify_bundle(path)


def picture(size: int, kind: str, seed: int) -> np.ndarray:
    """[2, size, size, 3] uint8: white noise, or smooth shapes with an edge and a flat area."""
    random = np.random.default_rng(seed)
    if kind == "random":
        return random.integers(0, 256, (2, size, size, 3), np.uint8)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(7 * x * (i + 1) + seed) * np.cos(5 * y + i) for i in range(6)]
    smooth = 127 + 100 * np.stack(waves, -1).reshape(size, size, 2, 3).transpose(2, 0, 1, 3)
    smooth[:, size // 3 : size // 2, : size // 2] = 255
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.5, 8, 100])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("size", [64, 128])
def test_picture_metrics_are_scikit_images(size: int, kind: str, noise: float) -> None:
    reference = picture(size, kind, 1)
    error = np.random.default_rng(2).normal(0, noise, reference.shape)
    result = (reference + error).round().clip(0, 255).astype(np.uint8)
    assert metrics.psnr(result, reference) == pytest.approx(
        peak_signal_noise_ratio(reference, result, data_range=255), rel=1e-9
    )
    each = [
        structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(reference, result, strict=True)
    ]
    assert metrics.ssim(result, reference) == pytest.approx(min(each), abs=1e-9)


def test_ssim_is_the_worst_of_the_batch() -> None:
    reference = picture(64, "smooth", 1)
    result = reference.copy()
    result[1] = picture(64, "random", 1)[1]
    worst = structural_similarity(reference[1], result[1], data_range=255, channel_axis=-1)
    assert worst < 0.5
    assert metrics.ssim(result, reference) == pytest.approx(worst, abs=1e-9)
    assert metrics.ssim(reference, reference) == pytest.approx(1)
    almost = reference.copy()
    almost[0, 0, 0, 0] ^= 1
    assert metrics.psnr(reference, reference) == pytest.approx(120)
    assert metrics.psnr(almost, reference) < metrics.psnr(reference, reference) < float("inf")  # JSON has no infinity


def test_vector_metrics_are_torchs() -> None:
    random = np.random.default_rng(3)
    reference = random.standard_normal((2, 77, 64), np.float32)
    result = reference + 0.05 * random.standard_normal(reference.shape, np.float32)
    x, y = torch.tensor(result).double(), torch.tensor(reference).double()
    assert metrics.cosine(result, reference) == pytest.approx(float(torch.cosine_similarity(x, y, dim=-1).min()))
    assert metrics.relative_l2(result, reference) == pytest.approx(float(torch.dist(x, y) / y.norm()))
    assert metrics.max_abs(result, reference) == pytest.approx(float((x - y).abs().max()))


def test_levels_do_not_wrap_around() -> None:
    low, high = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8)
    high[0, 0, 0, 0] = 255
    assert metrics.max_abs(low, high) == metrics.max_abs(high, low) == 255
    assert metrics.fraction_differing(low, high) == 1 / 12


@pytest.fixture
def foreign(sd: Path, copy_of: Copy) -> Path:
    """A bundle whose engine has not been verified, as one that was built on another machine."""
    bundle = copy_of(sd)
    (path,) = bundle.glob("engines/*/engine.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checks": {}, "verified": {}}))
    return bundle


def kept(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    (path,) = bundle.glob("engines/*/engine.json")
    return json.loads(path.read_text())["checks"]


def test_an_unverified_engine_is_verified_on_its_first_load(
    sd: Path, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "unverified: " in called("turbochain", "inspect", foreign).stdout
    Pipeline.load(foreign).close()
    assert "it is verified now, which happens once" in caplog.text
    assert kept(foreign) == {"text-to-image": kept(sd)["text-to-image"]}
    with Pipeline.load(foreign, chain="image-to-image"):
        assert kept(foreign) == kept(sd) and len(kept(sd)) == 2
    assert [p.name for p in foreign.glob("engines/*/*")] == ["engine.json"]
    assert "unverified: " not in called("turbochain", "inspect", foreign).stdout
    caplog.clear()
    with Pipeline.load(foreign) as pipe:
        assert pipe("a cat", seed=0, output_type="uint8").images.any()
    assert not caplog.records


def test_verify_keeps_what_it_found_of_an_unverified_engine(sd: Path, foreign: Path) -> None:
    assert called("turbochain", "verify", foreign).returncode == 0
    assert kept(foreign) == kept(sd)


def test_an_unverified_engine_that_errs_is_refused_each_time(foreign: Path) -> None:
    scaled("m", 1.01)(foreign, Path())
    reseal(foreign)
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"schedule: relative_l2 is .*, the bound is ≤ 0\.0001"):
            Pipeline.load(foreign)
    assert kept(foreign) == {}
    assert called("turbochain", "verify", foreign).returncode == 1
    assert kept(foreign).keys() == {"image-to-image"}  # whose own table is right


def test_the_checks_of_another_table_are_not_believed(sd: Path, copy_of: Copy) -> None:
    """The engine's graphs are the same, but not what the chain makes of them."""
    path = copy_of(sd)
    scaled("m", 1.01)(path, Path())
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"][TABLES] = vars(hashing.describe(path / TABLES))
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="schedule: relative_l2 is"):
        Pipeline.load(path)


def test_a_damaged_reference_verifies_nothing(foreign: Path) -> None:
    file = foreign / "reference.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"'reference\.safetensors' is damaged"):
        Pipeline.load(foreign)
    assert kept(foreign) == {}


def test_a_figure_that_is_too_low_is_shown_as_such() -> None:
    checks = [Check("image", "psnr", 20.0, 38.0, False), Check("unet", "relative_l2", 0.5, 1e-2, False)]
    near = [Check("a", "cosine", 0.99986, 0.9999, False), Check("a", "max_abs", 1.0000001, 1.0, False)]
    assert [verify.value_text(check) for check in near] == ["0.99986", "1.0000001"]
    with pytest.raises(VerificationError) as caught:
        verify.require(checks)
    assert "image: psnr is 20, the bound is ≥ 38; unet: relative_l2 is 0.5, the bound is ≤ 0.01" in str(caught.value)


def test_an_unverified_engine_in_a_folder_that_cannot_be_written(foreign: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, which needs no privilege."""
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" generate "$1" "a cat" -o "$3"'
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    turbochain = Path(sys.executable).with_name("turbochain")
    line = [*own, foreign, turbochain, tmp_path / "cat.png"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "cat.png").exists(), done
    assert "is verified again at each load: cannot write " in done.stderr and kept(foreign) == {}
