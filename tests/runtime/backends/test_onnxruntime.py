"""What ONNX Runtime's CPU provider holds in memory, and what is said if its CUDA provider is missing."""

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import ROOT, BundleFactory
from here import build_here
from packaging.requirements import Requirement
from standin import gpu, standing_in

from turbochain.engines.forms.cuda import rewrite
from turbochain.runtime import Bundle, InputError, TurbochainError
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.backends import onnxruntime_sessions as sessions
from turbochain.runtime.backends.contract import Device, Opened

UNET = "graphs/unet.{}-0.data"


def test_weights_are_read_where_they_are_mapped(sd: Path) -> None:
    assert resident(sd / UNET.format("fp32")) > 0.9 * (sd / UNET.format("fp32")).stat().st_size


def test_fp16_is_converted_once(bundle_of: BundleFactory, tmp_path: Path) -> None:
    path = tmp_path / "half.bundle"
    half = bundle_of("sd", "fp16")
    build_here(str(half), path, backend="onnxruntime", device="cpu", chains=["text-to-image"], quiet=True)
    assert resident(path / UNET.format("fp16")) < 0.5 * (path / UNET.format("fp16")).stat().st_size


def test_the_vae_is_packed(sd: Path) -> None:
    """Its encoder too: few weights, many multiplications."""
    weights = sd / "graphs/vae.fp32-0.data"
    assert resident(weights, "image") < 0.3 * weights.stat().st_size


RESIDENT = """
import sys
from pathlib import Path
import numpy as np
from turbochain.runtime import Pipeline

weights = Path(sys.argv[1]).resolve()
call = {"image": np.zeros((64, 64, 3), np.uint8), "num_inference_steps": 2, "strength": 0.5} if sys.argv[2:] else {}
with Pipeline.load(weights.parents[1], backend="onnxruntime", device="cpu") as pipe:
    pipe("a cat", seed=0, **call)
    lines = Path("/proc/self/smaps").read_text().splitlines()
found = [lines[i:] for i, line in enumerate(lines) if line.endswith(str(weights))]
print(sum(1024 * int(next(line for line in rest if line.startswith("Rss:")).split()[1]) for rest in found))
"""


def resident(weights: Path, *of_image: str) -> int:
    """Bytes of a bundle's data file that are in memory as the file holds them, once a picture is drawn.

    In a process of its own: that of the tests has so many mappings that they take seconds to read.
    """
    line = [sys.executable, "-c", RESIDENT, str(weights), *of_image]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


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


LIBRARIES = r"libraries of CUDA or cuDNN are missing, or of another version.*: pip install 'turbochain\[cuda\]'"


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available provider names")
def test_a_missing_provider_is_told_from_nodes_that_are_left_to_the_cpu(sd: Path) -> None:
    """ONNX Runtime goes on without the provider, and its own error is about the nodes in either case."""
    if sessions.CUDA in sessions.library().get_available_providers():
        pytest.skip("this onnxruntime has a CUDA provider")
    options = sessions.default_options()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with pytest.raises(TurbochainError, match=LIBRARIES) as caught:
        sessions.load(str(sd / "graphs/step.onnx"), "step", options, sessions.CUDA, {"device_id": "0"})
    assert "fallback to CPU EP has been explicitly disabled" in str(caught.value.__cause__)


class WithoutCudnn:
    """A session whose first launch of a convolution looks for cuDNN, in vain."""

    def run_with_iobinding(self, *arguments: object) -> None:
        raise RuntimeError("Non-zero status code: cuDNN is unavailable or disabled for CUDA Execution Provider")


def test_a_library_that_is_first_missed_in_a_launch_is_missing_too() -> None:
    with pytest.raises(TurbochainError, match=LIBRARIES):
        sessions.run("vae_decoder", WithoutCudnn(), None, None)


def test_a_graph_that_cannot_be_loaded_is_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(TurbochainError, match=r"^onnxruntime cannot load unet: .*[Pp]rotobuf"):
        sessions.load(str(tmp_path / "bad.onnx"), "unet", sessions.default_options(), sessions.CPU, {})


def test_an_older_release_is_refused_on_a_gpu(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(Bundle.open(sd), sd, {}, Device("cuda"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.9.2")
    with pytest.raises(InputError, match=r"1\.9\.2 is installed, and on a GPU .* or later is needed: pip install"):
        onnxruntime.executor(opened)


def test_on_a_gpu_a_session_is_of_the_engines_form(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the bundle's graph; and nothing of it may be computed elsewhere, or staged in memory of the host."""
    bundle = Bundle.open(small)
    form = rewrite(bundle.path / bundle.manifest.graphs["unet"].file)
    (tmp_path / onnxruntime.form_file("unet")).write_bytes(form)
    asked: list[tuple[object, ...]] = []

    def load(model: bytes, name: str, options: Any, provider: str, settings: object, without: Sequence[str]) -> None:
        strict = options.get_session_config_entry("session.disable_cpu_ep_fallback")
        asked.append((model, name, strict, provider, {*without}))
        raise TurbochainError("this machine has no such provider")

    monkeypatch.setattr(sessions, "load", load)
    with standing_in():
        made = onnxruntime.executor(Opened(bundle, tmp_path, {}, gpu()))
        with pytest.raises(TurbochainError, match="no such provider"):
            made.load(["unet"])
        made.close()
    assert asked == [(form, "unet", "1", sessions.CUDA, {"GatherSliceToSplitFusion"})]


def test_the_release_that_is_needed_is_the_one_that_is_installed_with_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (needed,) = (r for r in map(Requirement, extras["cuda"]) if r.name == "onnxruntime-gpu")
    assert str(needed.specifier) == f">={onnxruntime.LEAST_GPU}"
