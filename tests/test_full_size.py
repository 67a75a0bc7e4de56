"""The true architectures in full size, from source to picture (`make check-full`: 24 GiB, 30 GiB of disk)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ON_ARGUMENTS, command
from PIL import Image

import build_cost

ROOT = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.parametrize(("source", "precision"), [("synthetic:sd-turbo", "fp32"), ("synthetic:sdxl-turbo", "fp16")])
def test_full_size(source: str, precision: str, tmp_path: Path) -> None:
    bundle, picture = tmp_path / "full.bundle", tmp_path / "cat.png"
    built = command(
        "build-engine", source, "-o", bundle, "--precision", precision, "--json", *ON_ARGUMENTS, timeout=3600
    )
    assert built.returncode == 0, built.stderr
    assert all(check["passed"] for check in json.loads(built.stdout)["checks"])

    made = command("turbochain", "generate", bundle, "a photo of a cat", "-o", picture)
    assert made.returncode == 0, made.stderr
    assert Image.open(picture).size == (512, 512)

    timed = json.loads(command("turbochain", "bench", bundle, "--runs", 3, "--json").stdout)
    assert timed["overhead"]["min_ms"] < 5  # the least, as other processes only add to it

    if precision == "fp32":
        loaded = build_cost.script(build_cost.LOAD, bundle)
        assert loaded["peak_rss_anon_bytes"] <= 0.2 * loaded["weight_bytes"]  # the weights stay in the file
    else:
        check_tensorrt(bundle)


def check_tensorrt(bundle: Path) -> None:
    """TensorRT-RTX builds the largest stages for another machine, with every attention of the UNet fused."""
    line = [sys.executable, ROOT / "benchmarks/inspect_engines.py", bundle, "--graph", "unet", "--graph", "vae_decoder"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row for row in map(str.split, done.stdout.splitlines())}
    assert rows["unet"][2] == "140" and int(rows["unet"][1]) > 140  # two in each of 70 transformer blocks
    assert rows["vae_decoder"][2] == "0" and int(rows["vae_decoder"][1]) > 50  # its one attention has a single head
    assert rows["vae_decoder"][3] == "0"  # nothing is computed in fp32 where fp16 was meant
