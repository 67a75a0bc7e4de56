"""The harness of `make bench-gpu`, run on the CPU: the same code, other contenders."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import contenders
import gpu
import report
from contenders import Contender, Eager, Task
from contest import Contest, check
from turbochain.export.sources.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
RUNS = 2
WANTED = ["eager", "onnxruntime-stages", "onnxruntime", "onnxruntime-cached"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine PyTorch's threads wait for each other far longer than a miniature takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bench keeps its bundles; the miniature's is there already."""
    path = tmp_path_factory.mktemp("bench")
    subprocess.run(["cp", "-r", str(sd), str(path / "sd-turbo-mini-64x64-b1-fp32.bundle")], check=True)
    return path


@pytest.fixture(scope="module")
def results(folder: Path, checkpoints: dict[str, Path]) -> Path:
    """The file of one run."""
    line = ["--device", "cpu", "--source", checkpoints["sd"], "--size", "64x64", "--batch", 1, "--steps", 1, 2]
    line += ["--contenders", *WANTED, "--runs", RUNS, "--warmup", 1, "--folder", folder, "--results", folder / "out"]
    assert gpu.main(list(map(str, line))) == 0
    (path,) = (folder / "out").glob("*.json")
    assert path.name.startswith("sd-turbo-mini-cpu-20")
    return path


@pytest.fixture
def data(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text())


@pytest.fixture
def task(folder: Path, checkpoints: dict[str, Path]) -> Task:
    return Task(Checkpoint(checkpoints["sd"], None), "sd-turbo-mini", folder, "cpu", (64, 64), 1, (1,), "fp32")


def _rows(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in cell["rows"]}


def test_every_contender_has_a_row_in_every_cell(data: dict[str, Any]) -> None:
    assert [(c["steps"], c["batch"]) for c in data["cells"]] == [(1, 1), (2, 1)]
    for cell in data["cells"]:
        assert [row["contender"] for row in cell["rows"]] == [c.name for c in contenders.CPU]
        assert {name for name, row in _rows(cell).items() if row["status"] == "ok"} == set(WANTED)
        left_out = _rows(cell)["eager-bf16"]
        assert (left_out["status"], left_out["reason"], left_out["wall"]) == ("left out", "by --contenders", None)


def test_statistics_are_of_the_samples_that_count(data: dict[str, Any]) -> None:
    for cell in data["cells"]:
        rows = _rows(cell)
        for name in WANTED:
            wall = rows[name]["wall"]
            assert wall["n"] == RUNS and rows[name]["gpu"] is None
            assert 0 < wall["min_ms"] <= wall["p50_ms"] <= wall["p90_ms"] <= wall["p99_ms"]
            assert rows[name]["over_floor"] == pytest.approx(wall["p50_ms"] / rows[name]["floor_ms"])
        stages = rows["onnxruntime-stages"]["stages"]
        assert {g: t["n"] for g, t in stages.items()} == {
            "text_encoder": RUNS,
            "unet": RUNS * cell["steps"],
            "vae_decoder": RUNS,
        }
        assert sum(t["min_ms"] for t in stages.values()) < rows["onnxruntime-stages"]["wall"]["p99_ms"]


def test_pictures_are_checked_against_diffusers(data: dict[str, Any]) -> None:
    for cell in data["cells"]:
        for name in WANTED:
            checks = {c["metric"]: c for c in _rows(cell)[name]["checks"]}
            assert set(checks) == {"psnr", "ssim"} and all(c["passed"] for c in checks.values())
            assert checks["psnr"]["value"] > 70  # fp32 against fp32: a level here and there


def test_what_is_not_like_for_like_is_marked(data: dict[str, Any]) -> None:
    rows = _rows(data["cells"][0])
    assert rows["eager"]["differs"] is None and rows["onnxruntime"]["differs"] is None
    assert rows["onnxruntime-cached"]["differs"] == "the prompt is known, so no text encoder runs"
    assert rows["onnxruntime-cached"]["floor_ms"] < rows["onnxruntime"]["floor_ms"]


def test_the_file_says_how_to_repeat_it(data: dict[str, Any]) -> None:
    (run,) = data["runs"]
    assert run["versions"]["torch"] == torch.__version__ and run["seed"] == 0 and run["warmup"] == 1
    assert {"command", "commit", "date", "machine", "gpu", "ceilings", "prompt"} <= set(run)
    assert {"wall", "gpu", "gpu_memory_bytes", "floor", "order"} <= set(data["includes"])
    assert all(cell["run"] == 0 for cell in data["cells"])


def test_the_plot_shows_every_cell(results: Path) -> None:
    with Image.open(results.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    blue = (np.abs(pixels.astype(int) - (31, 119, 180)).max(-1) < 8).sum(axis=1) > 0
    bars = int((np.diff(blue.astype(int)) == 1).sum())
    assert bars >= 3  # ONNX Runtime's in the two panels, however close together


def test_a_later_command_adds_to_the_file(results: Path, data: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / results.name
    copy.write_text(results.read_text())
    again = gpu.Results(tmp_path, data["source"], "cpu", {"date": "later"})
    assert again.path == copy
    text = again.add({k: v for k, v in data["cells"][1].items() if k != "run"} | {"batch": 4})
    again.add({k: v for k, v in data["cells"][1].items() if k != "run"})
    merged = json.loads(copy.read_text())
    assert [(c["batch"], c["steps"], c["run"]) for c in merged["cells"]] == [(1, 1, 0), (1, 2, 1), (4, 2, 1)]
    assert merged["runs"][1] == {"date": "later"}
    assert "steps 2, batch 4" in text and "eager-bf16: left out: by --contenders" in text


def test_a_row_that_fails_says_so_and_the_others_go_on(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(Eager):
        def draw(self, steps: int) -> np.ndarray:
            return super().draw(steps)[..., ::-1]

    class Breaks(Eager):
        left = 3  # the first picture, the check and one sample

        def draw(self, steps: int) -> np.ndarray:
            if not self.left:
                raise RuntimeError("no more\nof them")
            self.left -= 1
            return super().draw(steps)

    for name, kind in {"swapped": Swapped, "breaks": Breaks}.items():
        monkeypatch.setitem(contenders.PIPELINES, name, lambda task, kind=kind: lambda: kind(task, torch.float32))
    names = ["swapped", "breaks", "tensorrt"]
    contest = Contest(task, [Contender(name, name, name) for name in names], names, float("inf"))
    rows = {row["contender"]: row for row in contest.cell(steps=1, runs=2, warmup=0)}
    contest.close()

    swapped, breaks, tensorrt = (rows[name] for name in names)
    assert swapped["status"] == "wrong picture" and swapped["wall"]["n"] == 2
    assert "psnr" in swapped["reason"] and "(bound 38)" in swapped["reason"]
    assert (breaks["status"], breaks["reason"]) == ("failed", "RuntimeError: no more of them")
    assert breaks["wall"] is None
    assert tensorrt["status"] == "missing" and "device='cpu': cuda, or cuda:N" in tensorrt["reason"]


def test_nothing_is_begun_after_the_time_is_spent(task: Task) -> None:
    contest = Contest(task, contenders.CPU, ["eager"], end=0)
    assert _rows({"rows": contest.cell(1, 1, 0)})["eager"]["reason"] == "the time was spent"


def test_check() -> None:
    reference = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    assert all(c["passed"] for c in check(reference, reference))
    assert not any(c["passed"] for c in check(reference[:, ::-1], reference))


def _row(name: str, p50: float, status: str = "ok") -> dict[str, Any]:
    return {"contender": name, "status": status, "wall": {"p50_ms": p50}}


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([_row("eager", 60), _row("tensorrt", 12)], [True, True]),
        ([_row("eager", 60), _row("tensorrt", 12.5)], [False, True]),
        ([_row("eager", 90), _row("onnxruntime", 15)], [True, False]),
        ([_row("eager", 60, "wrong picture"), _row("tensorrt", 12)], [None, True]),
        ([_row("eager", 60), _row("tensorrt", 12, "wrong picture")], [None, None]),
    ],
)
def test_bars(rows: list[dict[str, Any]], verdicts: list[bool | None]) -> None:
    assert [bar["passed"] for bar in gpu.bars("sdxl", "NVIDIA H200", rows)] == verdicts
    assert len(gpu.bars("sdxl", "another", rows)) == 1  # the bound in milliseconds is for that GPU


def test_the_report_has_a_table_of_a_gpu(data: dict[str, Any]) -> None:
    measured = {**data, "gpu": "NVIDIA H200"}
    measured["runs"][0]["gpu"] = {"driver": "580.1", "cuda": "13.0"}
    rows = [_row("eager", 60), _row("tensorrt", 15)]
    measured["cells"][0]["bars"] = gpu.bars("sdxl", "NVIDIA H200", rows)
    text = report.gpu_tables([measured])
    assert "sd-turbo-mini on NVIDIA H200" in text and "driver 580.1" in text
    assert text.count("| left out |") == 1 and "| floor |" in text
    assert "at most 14: 15 (tensorrt), **missed**" in text and "at least 5: 4 (tensorrt), **missed**" in text
    assert "nothing has been measured" in report.gpu_tables([])


def test_without_a_gpu_one_line_says_so() -> None:
    line = ["make", "bench-gpu", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(
        line, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2
    said = [text for text in done.stderr.splitlines() if not text.startswith("make")]
    assert len(said) == 1 and said[0].startswith("bench-gpu: error: this measures an NVIDIA GPU, and ")


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--contenders", "fastest", "--folder", str(tmp_path)]) == 2
    assert "--contenders fastest: choose from eager, eager-bf16, onnxruntime-stages" in capsys.readouterr().err
