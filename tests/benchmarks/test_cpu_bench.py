"""`make bench-smoke`: the comparison with the peers, on the miniature."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, BundleFactory
from skimage.metrics import peak_signal_noise_ratio

sys.path.append(str(ROOT / "benchmarks"))
import cpu
import cpu_rows
import cpu_text
import peers
import report

PAIRS = (
    "openvino-fp32:eager-fp32",
    "onnxruntime-fp32:eager-bf16-channels-last+own-vae",
    "openvino-fp32:optimum-onnx",
)


def bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    where = ("--folder", folder, "--results", folder / "results")
    line = [sys.executable, "benchmarks/cpu.py", "synthetic:sd-turbo-mini", "--size", "64x64", *where, *options]
    return subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_smoke(tmp_path: Path) -> None:
    cold = (PAIRS[0], "openvino-fp32:none-such")
    done = bench(tmp_path, "--vae", "tiny", "--runs", "1", "--pairs", *PAIRS, "--cold", *cold, "--batches", "1")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    assert result["machine"]["cores"] and result["includes"]["seconds"] and result["commit"] and result["versions"]
    first, second, last = result["pairs"]
    for pair in (first, second):
        ours, peer, ratio = pair["of"]["ours"], pair["of"]["peer"], pair["ratio"]
        assert ratio["n"] == 1 and ratio["least"] <= ratio["median"] <= ratio["most"]
        assert ratio["least"] <= 2 * peer["median_seconds"] / ours["median_seconds"]
        assert ours["stages"].keys() == {"text_encoder", "unet", "vae_decoder"} and peer["stages"] == {}
        assert 0 < sum(ours["stages"].values()) < 1.5 * ours["median_seconds"]
        for row in (ours, peer):
            assert row["against_fp32"]["passed"] and row["peak_rss_bytes"] > 50e6
    assert first["of"]["peer"]["against_fp32"]["max_abs"] == 0  # it is the reference
    assert first["of"]["ours"]["against_fp32"]["max_abs"] <= 1
    assert second["differs"] == "fp32 against bf16; the peer decodes with the checkpoint's own VAE"
    assert second["of"]["peer"]["versions"]["torch"] == result["versions"]["torch"]
    if not (peers.ENVIRONMENTS / "optimum-onnx").exists():
        assert last["reason"] == "missing: optimum-onnx is not installed (make bench-setup)"
        assert last["reason"] in done.stdout and last["reason"] in report.pair_table(result)
    assert "faster by" in done.stdout and "× floor" in done.stdout
    (growth,) = result["steps"]
    assert growth["ours"] == "openvino-fp32" and list(growth["seconds"]) == ["1", "2", "3", "4"]
    assert growth["seconds"]["4"] > growth["seconds"]["1"] and growth["slope_seconds"] > 0
    cold, failed = result["cold"]
    assert failed["reason"].startswith("failed: ") and "seconds" not in failed
    assert failed["reason"] in done.stdout and failed["reason"] in report.pair_table(result)
    for taken in cold["seconds"].values():
        assert taken["picture"] > 0 and taken["load"] + taken["picture"] < taken["whole"]
    assert cold["ratio"]["n"] == 1
    (batches,) = result["batches"]
    assert list(batches["seconds"]) == ["1"] and batches["ratio"]["1"]["n"] == 1
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert result["floors"].keys() == {"fp32"} and result["floors"]["fp32"]["stages"]["unet"]["flops"] > 0
    assert "| openvino-fp32 | " in report.pair_table(result)
    only_one_at_a_time(tmp_path)


def only_one_at_a_time(folder: Path) -> None:
    """`--apart`, with what `test_smoke` has built."""
    bench = cpu.Bench("synthetic:sd-turbo-mini", "tiny", folder, (64, 64), 1, 1, 2, apart=True)
    start, started = bench.start, []

    def watched(name: str) -> peers.Worker:
        assert all(worker.process.poll() is not None for worker in started)
        started.append(start(name))
        return started[-1]

    bench.start = watched  # type: ignore[method-assign, assignment]
    row = bench.pair("openvino-fp32", "onnxruntime-fp32")
    assert row["ratio"]["n"] == 2 and len(started) == 4
    assert row["reason"] is None and cpu_text.remarks(row) == "each loaded anew for every picture"


def test_every_variant_runs(bundle_of: BundleFactory, tmp_path: Path) -> None:
    arguments = ("--runs", "2", "--graphs", "vae_decoder", "--results", tmp_path)
    line = [sys.executable, "benchmarks/variants.py", bundle_of("sd"), *arguments]
    done = subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    own, *others = result["graphs"]["vae_decoder"]
    exact = [row for row in others if row["variant"] == "fp32"]
    assert len(exact) == (result["precision"] != "fp32") and all(row["error"] < 1e-3 for row in exact)
    assert "| one thread | " in report.variants_table(result)
    assert own["seconds"] > 0 and own["variant"] in done.stdout
    assert all(row["ratio"]["n"] == 2 and row["error"] < 0.1 and row["load_seconds"] > 0 for row in others)
    assert [row["variant"] for row in others if row.get("cache_bytes")] == ["graph from OpenVINO's cache on disk"]


def test_a_wrong_picture_is_noticed() -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    other = np.clip(picture.astype(int) + random.integers(-9, 10, picture.shape), 0, 255).astype(np.uint8)
    same, wrong = (cpu_rows.check(p, picture, "bf16") for p in (picture, other))
    assert same["passed"] and same["max_abs"] == 0 and not wrong["passed"]
    near = np.where(picture > 127, picture - 2, picture).astype(np.uint8)  # two levels: too many for fp32 alone
    assert cpu_rows.check(near, picture, "bf16")["passed"] and not cpu_rows.check(near, picture, "fp32")["passed"]
    assert wrong["psnr"] == pytest.approx(peak_signal_noise_ratio(picture, other, data_range=255), abs=1e-6)


def test_a_contender_that_fails_has_a_row_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^failed: "):
        peers.Worker("eager-fp32", tmp_path / "nothing", (64, 64), 1)


def test_an_engine_that_cannot_be_built_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.ENGINES, "openvino-fp32", {"backend": "openvino", "options": {"none_such": 1}})
    bench = cpu.Bench("synthetic:sd-turbo-mini", None, tmp_path, (64, 64), 1, 1, 1)
    row = bench.pair("openvino-fp32", "eager-fp32")
    assert "none_such" in row["reason"] and "of" not in row


def test_a_contender_without_an_answer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LIMIT", 0.05)
    with pytest.raises(RuntimeError, match=r"^failed: no answer within 0\.05 s$"):
        peers.Worker("eager-fp32", tmp_path / "nothing", (64, 64), 1)
