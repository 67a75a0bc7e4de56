"""What ONNX Runtime's CPU provider holds in memory."""

import subprocess
import sys
from pathlib import Path

import onnx
from conftest import BundleFactory

from turbochain.engines import build
from turbochain.runtime import Pipeline
from turbochain.runtime.backends import onnxruntime_sessions as sessions

UNET = "graphs/unet.{}-0.data"


def test_weights_are_read_where_they_are_mapped(sd: Path) -> None:
    assert resident(sd / UNET.format("fp32")) > 0.9 * (sd / UNET.format("fp32")).stat().st_size


def test_fp16_is_converted_once(bundle_of: BundleFactory, tmp_path: Path) -> None:
    path = tmp_path / "half.bundle"
    half = bundle_of("sd", "fp16")
    build(str(half), path, backend="onnxruntime", device="cpu", quiet=True)
    assert resident(path / UNET.format("fp16")) < 0.5 * (path / UNET.format("fp16")).stat().st_size


def resident(weights: Path) -> int:
    """Bytes of a bundle's data file that are in memory as the file holds them, once a picture is drawn."""
    with Pipeline.load(weights.parents[1], backend="onnxruntime", device="cpu") as pipe:
        pipe("a cat", seed=0)
        lines = Path("/proc/self/smaps").read_text().splitlines()
    found = [lines[i:] for i, line in enumerate(lines) if line.endswith(str(weights.resolve()))]
    return sum(1024 * int(next(line for line in rest if line.startswith("Rss:")).split()[1]) for rest in found)


CLOSED = """
import sys
from turbochain.runtime import Pipeline

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

with Pipeline.load(sys.argv[1], backend="onnxruntime", device="cpu") as pipe:
    loaded = anonymous()
    pipe("a cat", seed=0)
    drawn = anonymous()
print(drawn - loaded, anonymous() - loaded)
"""


def test_a_closed_pipeline_gives_the_arena_back(demo: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CLOSED, str(demo)], capture_output=True, text=True, check=True)
    drawn, closed = map(float, done.stdout.split())
    assert drawn > 50 and closed < 0.3 * drawn, done.stdout  # MiB


def test_the_model_that_shrinks_the_arena_is_one() -> None:
    model = onnx.load_from_string(sessions.IDENTITY)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
