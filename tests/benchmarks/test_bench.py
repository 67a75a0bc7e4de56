"""The harness on the miniature: `make bench-smoke`. A GPU's modes of measuring run here on the CPU."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from here import phases_here
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from test_parity import load_diffusers, theirs

import bench
import contenders
import figures
import floor
import machine
import process
import product
import result
import tables
from contenders import Contender
from measure import Measure, Settings
from process import ContenderError, Process
from result import Result
from rows import Pair
from turbochain.runtime.commands.bench import PROMPT

PAIRS = ("onnxruntime-fp32:eager-fp32+own-vae", "onnxruntime-fp32:optimum-onnx")
COLD = ("onnxruntime-fp32:openvino-fp32", "onnxruntime-fp32:optimum-onnx")
STAGES = {"text_encoder", "unet", "step", "vae_decoder"}


@pytest.fixture(scope="module")
def folder(sd: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the benchmark keeps checkpoints and bundles; the miniature's are there already."""
    path = tmp_path_factory.mktemp("bench")
    (path / "sd-turbo-mini").symlink_to(checkpoints["sd"])
    subprocess.run(["cp", "-r", str(sd), str(path / "sd-turbo-mini-64x64-b1-fp32.bundle")], check=True)
    return path


@pytest.fixture(scope="module", autouse=True)
def builds_here() -> Iterator[None]:
    """Build engines in this process; the processes of a build have tests of their own."""
    with phases_here():
        yield


@pytest.fixture(scope="module")
def small_floor() -> Any:
    """The machine's rates from products and copies that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "CPU_PRODUCTS", ((256, 256, 256),))
        patch.setattr(floor, "CPU_CONVOLUTIONS", ((32, 32),))
        patch.setattr(floor, "CPU_COPIES", (2**20,))
        yield


REFERENCE = Measure._reference


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path]) -> dict[int, np.ndarray]:
    """Step count → the picture that diffusers makes in this process."""
    pipe = load_diffusers(checkpoints["sd"])
    call = {"prompt": [PROMPT], "seed": process.SEED}
    return {steps: theirs(pipe, {**call, "num_inference_steps": steps}) for steps in (1, 2)}


@pytest.fixture(scope="module")
def drawn_here(references: dict[int, np.ndarray]) -> Iterator[None]:
    """Compare with `references`; the process that draws them for a user has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measure, "_reference", lambda self, contender, batch, steps: references[steps])
        yield


@pytest.fixture(scope="module")
def smoke(folder: Path, small_floor: None, drawn_here: None) -> tuple[Path, str]:
    """The file of one run, and its output."""
    where = ["--folder", folder, "--results", folder / "results"]
    line = ["synthetic:sd-turbo-mini", "--size", "64x64", "--runs", 1, "--pairs", *PAIRS, "--cold", *COLD]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert bench.main(list(map(str, [*line, "--batches", 1, *where]))) == 0
    (path,) = (folder / "results").glob("*.json")
    return path, told.getvalue()


@pytest.fixture
def found(smoke: tuple[Path, str]) -> Result:
    return result.read(smoke[0])


@pytest.fixture(scope="module")
def measure(folder: Path, drawn_here: None) -> Measure:
    """Of one step in two rounds."""
    return Measure(Settings("synthetic:sd-turbo-mini", None, folder, "cpu", (64, 64), (1,), 2))


def made_of(*rows: Pair) -> Result:
    return Result("synthetic:sd-turbo-mini", 64, 64, "cpu", None, None, (machine.run(),), pairs=rows)


def with_settings(measure: Measure, **changed: Any) -> Measure:
    """The same, with its engines and references, under other settings."""
    other = copy.copy(measure)
    other.settings = replace(measure.settings, **changed)
    return other


def test_a_pair_has_its_figures(found: Result) -> None:
    pair = found.pairs[0]
    ours, peer, ratio = pair.our_figures, pair.peer_figures, pair.ratio
    assert ours and peer and ratio and pair.reason is None
    assert ratio.n == 1 and ratio.least <= ratio.median <= ratio.most
    assert ratio.median == pytest.approx(peer.median_seconds / ours.median_seconds)
    assert ours.stages.keys() == STAGES and peer.stages == {}
    assert 0 < sum(ours.stages.values()) < 1.5 * ours.median_seconds
    for of in (ours, peer):
        assert of.against_fp32.passed and of.peak_rss_bytes > 50e6 and of.gpu_seconds is of.gpu_memory_bytes is None
        assert of.load_seconds > 0 and of.first_picture_seconds > 0
    assert ours.precision == peer.precision == dict.fromkeys(STAGES - {"step"}, "fp32")
    assert peer.against_fp32.max_abs == 0  # it is the reference
    assert ours.against_fp32.max_abs <= 1
    assert pair.differs == "the peer decodes with the checkpoint's own VAE"
    assert peer.versions["torch"] == found.runs[0].versions["torch"]


@pytest.mark.skipif((process.ENVIRONMENTS / "optimum-onnx").exists(), reason="the peer is installed")
def test_a_missing_peer_is_a_row_with_its_reason(found: Result, smoke: tuple[Path, str]) -> None:
    missing = "missing: optimum-onnx is not installed (make bench-setup)"
    for row in (found.pairs[1], found.cold[1]):
        assert row.reason == missing and row.ratio is None
    assert smoke[1].count(missing) == tables.pairs(found).count(missing) == 2


def test_the_rest_is_measured(found: Result, smoke: tuple[Path, str]) -> None:
    path, told = smoke
    (growth,), (batches,), (least,) = found.growth, found.batches, found.floors
    assert growth.ours == "onnxruntime-fp32" and list(growth.seconds) == ["1", "2", "3", "4"]
    line = np.polyfit([1, 2, 3, 4], list(growth.seconds.values()), 1)
    assert growth.slope_seconds == pytest.approx(line[0]) and growth.ratio.n == 1
    assert list(batches.seconds) == ["1"] and batches.ratio["1"].n == 1
    assert least.precision == "fp32" and least.stages["unet"].flops > 0
    cold = found.cold[0]
    for taken in cold.seconds.values():
        assert taken.picture > 0 and taken.load + taken.picture < taken.whole
    assert cold.ratio and cold.ratio.n == 1
    assert "faster by" in told and "× floor" in told and "| onnxruntime-fp32 | " in told
    with Image.open(path.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    green = (np.abs(pixels - (44, 160, 44)).max(-1) < 8).sum(axis=1) > 0
    assert (np.diff(green.astype(int)) == 1).sum() >= 4  # ours in the first panel, its stages in the second


def test_the_file_says_how_to_repeat_it(found: Result) -> None:
    (run,) = found.runs
    assert run.versions["torch"] == torch.__version__ and run.commit and run.date and run.machine.cores
    assert run.command and run.command.startswith("python benchmarks/") and found.seed == 0 and found.prompt
    assert {"seconds", "gpu_seconds", "gpu_memory_bytes", "floors", "order"} <= set(found.includes)


def test_steps_and_modes_are_rows_of_their_own(measure: Measure) -> None:
    bench = with_settings(measure, steps=(1, 2), warmup=1)
    rows = list(bench.pair("onnxruntime-fp32+cached", "onnxruntime-fp32+stages", 1))
    assert [row.steps for row in rows] == [1, 2]
    for row in rows:
        cached, stages = row.our_figures, row.peer_figures
        assert row.reason is None and cached and stages and row.ratio and row.ratio.n == 2
        assert row.differs == "the prompt is known, so no text encoder runs; stages launched one by one"
        assert cached.stages.keys() == STAGES - {"text_encoder"} and stages.stages.keys() == STAGES
        for of in (cached, stages):
            assert of.against_fp32.passed and of.against_fp32.psnr > 70  # fp32 against fp32: a level here and there
            assert of.least_seconds <= of.median_seconds <= of.p90_seconds and of.p99_seconds is None


@pytest.mark.full
def test_by_turns_never_two_are_in_memory(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = with_settings(measure, turns=2, runs=3, steps=(1, 2))
    started: list[Process] = []

    def watched(contender: Contender, batch: int, **more: Any) -> Process:
        assert all(process.process.poll() is not None for process in started)
        started.append(Measure.start(bench, contender, batch, **more))
        return started[-1]

    monkeypatch.setattr(bench, "start", watched)
    rows = list(bench.pair("openvino-fp32", "onnxruntime-fp32", 1))
    assert [row.steps for row in rows] == [1, 2] and len(started) == 4
    for row in rows:
        assert row.ratio and row.ratio.n == 3 and row.reason is None
        assert row.our_figures and row.our_figures.stages.keys() == STAGES
    assert "loaded by turns" in tables.pairs(made_of(*rows))


@pytest.mark.full
def test_the_reference_is_diffusers_picture(measure: Measure, references: dict[int, np.ndarray]) -> None:
    bench = with_settings(measure, steps=(1, 2))
    for steps, expected in references.items():
        np.testing.assert_array_equal(REFERENCE(bench, contenders.find("onnxruntime-fp32"), 1, steps), expected)


def test_what_goes_wrong_is_said_and_the_others_go_on(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(Process):
        def draw(self, steps: int, save: Path | None = None) -> dict[str, Any]:
            drawn = super().draw(steps, save)
            if save:
                np.save(save, np.load(save)[..., ::-1])
            return drawn

    class Breaks(Process):
        left = 2  # the first picture and one sample

        def draw(self, steps: int, save: Path | None = None) -> dict[str, Any]:
            self.left -= 1
            if self.left < 0:
                self.process.kill()
            return super().draw(steps, save)

    def start(contender: Contender, batch: int, **more: Any) -> Process:
        started = Measure.start(bench, contender, batch, **more)
        started.__class__ = kinds.get(contender.name, Process)
        return started

    bench = with_settings(measure)
    kinds = {"onnxruntime-fp32+stages": Swapped, "onnxruntime-fp32": Breaks}
    monkeypatch.setattr(bench, "start", start)
    (swapped,) = bench.pair("onnxruntime-fp32+stages", "onnxruntime-fp32+cached", 1)
    (breaks,) = bench.pair("onnxruntime-fp32", "onnxruntime-fp32+cached", 1)
    assert swapped.reason == "wrong picture: onnxruntime-fp32+stages" and swapped.ratio and swapped.ratio.n == 2
    assert breaks.reason and breaks.reason.startswith("failed: ") and breaks.ratio is breaks.our_figures is None


def test_an_engine_that_cannot_be_built_is_a_row_with_its_reason(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = with_settings(measure)
    bench._engines = {}
    refused = replace(contenders.CONTENDERS["openvino-fp32"], options={"none_such": 1})
    monkeypatch.setitem(contenders.CONTENDERS, "openvino-fp32", refused)
    (row,) = bench.pair("openvino-fp32", "eager-fp32", 1)
    assert row.reason and "none_such" in row.reason and row.our_figures is None
    (row,) = bench.pair("tensorrt-fp16", "eager-fp32", 1)
    assert row.reason and "device='cpu': cuda, or cuda:N" in row.reason


def test_another_precision_of_the_vae_is_for_one_that_diffusers_moves_to_fp32(measure: Measure) -> None:
    (row,) = measure.pair("openvino-fp32", "eager-fp16-tuned+bf16-vae", 1)
    assert row.reason == "left out: diffusers runs this VAE in fp16 as it is" and row.ratio is None


def test_nothing_is_begun_after_the_time_is_spent(measure: Measure) -> None:
    bench = with_settings(measure, end=0.0)
    assert [row.reason for row in bench.pair("openvino-fp32", "eager-fp32", 1)] == ["left out: the time was spent"]
    assert bench.cold("openvino-fp32", "eager-fp32").reason == "left out: the time was spent"


def test_another_vae(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "sd-turbo-mini").symlink_to(checkpoints["sd"])
    own = product.checkpoint("synthetic:sd-turbo-mini", tmp_path)
    made = product.with_vae(own, "synthetic:sd-turbo-mini", "tiny", tmp_path)
    assert made.configs["vae"]["_class_name"] == "AutoencoderTiny" and made.configs["unet"] == own.configs["unet"]
    assert own.configs["vae"]["_class_name"] == "AutoencoderKL"


def test_a_wrong_picture_is_noticed() -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    other = np.clip(picture.astype(int) + random.integers(-9, 10, picture.shape), 0, 255).astype(np.uint8)
    same, wrong = (figures.check(p, picture, "bf16") for p in (picture, other))
    assert same.passed and same.max_abs == 0 and not wrong.passed
    near = np.where(picture > 127, picture - 2, picture).astype(np.uint8)  # two levels: too many for fp32 alone
    assert figures.check(near, picture, "bf16").passed and not figures.check(near, picture, "fp32").passed
    assert not figures.check(picture[:, ::-1], picture, "fp16").passed
    assert wrong.psnr == pytest.approx(peak_signal_noise_ratio(picture, other, data_range=255), abs=1e-6)


def test_a_peer_may_truncate_to_levels() -> None:
    exact = np.random.default_rng(0).uniform(0, 255, (1, 32, 32, 3))
    rounded, truncated = np.rint(exact).astype(np.uint8), np.floor(exact).astype(np.uint8)
    assert figures.check(truncated, rounded, "fp32", truncated=True).passed
    assert not figures.check(truncated, rounded, "fp32").passed
    assert not figures.check(np.maximum(truncated, 1) - 1, rounded, "fp32", truncated=True).passed


def test_other_precisions_are_not_like_for_like() -> None:
    eager, ours = {"unet": "fp16", "vae_decoder": "fp32"}, {"unet": "fp16", "vae_decoder": "fp16"}
    assert figures.differs("fp32", "bf16", [{}, {}]) == "fp32 against bf16"
    assert figures.differs("fp16", "fp16", [ours, eager]) == "vae_decoder in fp16, the peer's in fp32"
    assert figures.differs("fp16", "fp16", [ours, ours]) is figures.differs("fp16", "fp16", [ours, {}]) is None


def test_a_contender_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match=r"^failed: "):
        Process(contenders.find("onnxruntime-fp32"), tmp_path / "nothing", size=(64, 64), engine="none")


def test_a_contender_without_an_answer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LIMIT", 0.05)
    with pytest.raises(ContenderError, match=r"^failed: no answer within 0\.05 s$"):
        Process(contenders.REFERENCE, tmp_path / "nothing", size=(64, 64))


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("openvino-fp32:fastest", "there is no contender fastest: choose from openvino-bf16, openvino-fp32, "),
        ("openvino-fp32", "'openvino-fp32' is not a pair: OURS:PEER was expected"),
    ],
)
def test_a_pair_that_is_none_is_refused(
    pair: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench.main(["synthetic:sd-turbo-mini", "--pairs", pair, "--folder", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["synthetic:sd-turbo-mini", "--device", "cuda", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("bench: error: this measures an NVIDIA GPU, and ")


@pytest.mark.full
def test_make_says_so_in_one_line() -> None:
    line = ["make", "bench-gpu", f"BIN={Path(sys.executable).parent}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    said = [text for text in done.stderr.splitlines() if not text.startswith("make")]
    assert len(said) == 1 and said[0].startswith("bench: error: this measures an NVIDIA GPU, and ")
