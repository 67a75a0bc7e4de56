"""What is OpenVINO's alone; the conformance test is in test_backends.py, the bounds in test_verify.py."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CORES, BundleFactory, called, command
from here import build_here, phases_here
from skimage.metrics import peak_signal_noise_ratio
from test_parity import assert_same_picture, load_diffusers, theirs

from turbochain.runtime import (
    Bundle,
    BundleError,
    InputError,
    Pipeline,
    TurbochainError,
    VerificationError,
    backends,
    selection,
)
from turbochain.runtime.backends import cpus
from turbochain.runtime.backends import openvino as backend
from turbochain.runtime.bundle.manifest import PRECISIONS
from turbochain.runtime.checks.bounds import BOUNDS

Copy = Callable[[Path], Path]
openvino = backend.library()
ops = openvino.opset13
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
TEXT = ["text-to-image"]
CALL = {"prompt": "a cat in the snow", "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def engines(bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "fp32" and "default": copies of the SD miniature, each with one engine; the second was built after the first."""
    made = {}
    for name, arguments in {"fp32": ("--precision", "fp32", "--chains", *TEXT), "default": ()}.items():
        made[name] = tmp_path_factory.mktemp("openvino") / f"{name}.bundle"
        shutil.copytree(bundle_of("sd"), made[name])
        shutil.rmtree(made[name] / "engines")
        with phases_here():
            done = called("build-engine", made[name], *arguments)
        assert done.returncode == 0, done.stderr
        made[name].with_suffix(".txt").write_text(done.stdout + done.stderr)
    return made


def picture(bundle: Path, **where: Any) -> np.ndarray:
    with Pipeline.load(bundle, **where) as pipe:
        return pipe(**CALL, output_type="uint8").images


def test_it_is_the_default_on_a_cpu_and_says_why(engines: dict[str, Path]) -> None:
    said = engines["default"].with_suffix(".txt").read_text()
    assert "backend openvino on cpu: it is the fastest on a CPU, and computes in bf16 if the CPU can" in said
    rows = (row.split() for row in said.splitlines())
    computed = {row[0]: row[1] for row in rows if len(row) > 1 and row[1] in PRECISIONS}
    arithmetic = {"step", "step+guidance", "start"}  # in fp32, whatever the rest is in
    assert {computed.pop(graph) for graph in arithmetic} == {"fp32"}
    networks = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    assert computed == dict.fromkeys(networks, "bf16" if HAS_BF16 else "fp32")
    assert " fp32 " in engines["fp32"].with_suffix(".txt").read_text()


def test_nobody_is_told_of_it_and_two_threads_may_be_the_first(engines: dict[str, Path]) -> None:
    """openvino_telemetry, which is installed here, forks a process that reports each import of openvino.

    Both threads import the library, which is imported in a way of its own.
    """
    assert importlib.util.find_spec("openvino_telemetry")
    code = (
        "import sys, concurrent.futures as c, pathlib, turbochain.runtime as t; sys.setswitchinterval(1e-6)\n"
        "pipes = list(c.ThreadPoolExecutor(2).map(t.Pipeline.load, 2 * sys.argv[1:])); pipes[1]('a cat', seed=0)\n"
        "print(len(pipes))\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry')])\n"
        "print([t.read_text() for t in pathlib.Path('/proc/self/task').glob('*/children') if t.read_text()])"
    )
    done = subprocess.run([sys.executable, "-c", code, engines["fp32"]], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["2", "[]", "[]"], done


def test_nothing_of_the_weights_is_written(engines: dict[str, Path]) -> None:
    for bundle in engines.values():
        assert [path.name for path in bundle.glob("engines/*/*")] == ["engine.json"]


def test_fp32_is_diffusers_picture(engines: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    assert_same_picture(picture(engines["fp32"]), theirs(load_diffusers(checkpoints["sd"]), CALL))


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_bf16_is_close_to_diffusers_in_fp32(engines: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    (expected,) = theirs(load_diffusers(checkpoints["sd"]), CALL)
    assert peak_signal_noise_ratio(expected, picture(engines["default"])[0], data_range=255) >= 38


@pytest.mark.full
@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_auto_takes_the_fastest_within_its_bounds(demo: Path, copy_of: Copy) -> None:
    """A trained model, whose objects move where bf16 rounds: what auto refuses fails when it is asked for."""
    bundle = copy_of(demo)
    shutil.rmtree(bundle / "engines")
    done = command("build-engine", bundle, "--chains", *TEXT)
    assert done.returncode == 0, done.stderr
    refused, next_one = re.findall(
        r"^inference_precision=(\w+): chain [\w-]+: the result differs .*; next: (\S+)$", done.stderr, re.M
    )[-1]
    chosen = next_one.removeprefix("inference_precision=")
    assert (refused, chosen) in {("bf16", "mixed"), ("mixed", "fp32")}
    (path,) = bundle.glob("engines/*/engine.json")
    written = json.loads(path.read_text())
    assert written["key"]["options"]["inference_precision"] == "auto" and "ordered" not in written
    assert written["settled"] == {"inference_precision": chosen}
    assert f"inference_precision={chosen}" in called("turbochain", "inspect", bundle).stdout
    again = build_here(str(bundle), chains=TEXT, quiet=True)
    assert again.phases == [] and again.precision["unet"] == "fp32"
    assert again.precision["vae_decoder"] == {"mixed": "bf16", "fp32": "fp32"}[chosen]
    with pytest.raises(VerificationError, match="the result differs"):
        build_here(str(bundle), options={"inference_precision": refused}, chains=TEXT, quiet=True)
    assert len(list(bundle.glob("engines/*"))) == 1
    with Pipeline.load(bundle) as pipe:
        assert pipe("a large red circle on a white background", seed=0, output_type="uint8").images.any()


def test_an_fp16_bundle(bundle_of: BundleFactory, checkpoints: dict[str, Path], copy_of: Copy) -> None:
    """Its graphs hold GroupNormalization, and all that is put into them must be in fp16 too."""
    bundle = copy_of(bundle_of("sd", "fp16"))
    shutil.rmtree(bundle / "engines")
    options = {"inference_precision": "fp32"}
    made = build_here(str(bundle), backend="openvino", options=options, chains=TEXT, quiet=True)
    assert made.precision["vae_decoder"] == "fp16"
    (expected,) = theirs(load_diffusers(checkpoints["sd"]), CALL)
    assert peak_signal_noise_ratio(expected, picture(bundle)[0], data_range=255) >= 38


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_mixed_is_bf16_for_the_vae_alone(engines: dict[str, Path], copy_of: Copy) -> None:
    bundle = copy_of(engines["fp32"])
    chains = ["image-to-image"]
    made = build_here(str(bundle), options={"inference_precision": "mixed"}, chains=chains, quiet=True)
    lower = {graph for graph, precision in made.precision.items() if precision == "bf16"}
    assert lower == {"vae_encoder", "vae_decoder"} and {*made.precision.values()} == {"fp32", "bf16"}
    held_to = {check.stage: check.bound for check in made.checks["image-to-image"]}
    assert held_to["unet"] == BOUNDS["fp32"]["prediction"]["relative_l2"]
    assert held_to["vae_encoder"] == BOUNDS["bf16"]["image_latents"]["relative_l2"]
    assert held_to["vae_decoder"] == BOUNDS["bf16"]["picture"]["psnr"]


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_the_engine_built_last_is_taken_unless_another_is_named(engines: dict[str, Path], copy_of: Copy) -> None:
    bundle = copy_of(engines["fp32"])
    names = [path.name for path in bundle.glob("engines/*")]
    (last,) = engines["default"].glob("engines/*")  # in bf16
    shutil.copytree(last, bundle / "engines" / last.name)
    names.append(last.name)
    drawn = []
    for name, engine in ((names[1], None), (names[0], names[0])):
        with Pipeline.load(bundle, engine=engine) as pipe:
            assert pipe.engine_name == name
            drawn.append(pipe(**CALL, output_type="uint8").images)
    assert called("turbochain", "verify", bundle, "--engine", names[0], "--json").stdout.count(names[0]) == 1
    assert (drawn[0] != drawn[1]).any()
    with pytest.raises(InputError, match=rf"has no engine 'x': choose from {names[0][:12]}"):
        Pipeline.load(bundle, engine="x")


def test_the_weights_are_not_in_memory_twice(engines: dict[str, Path]) -> None:
    """What is mapped of a graph's file takes no memory any more once the graph is compiled."""
    with Pipeline.load(engines["default"]):
        lines = Path("/proc/self/smaps").read_text().splitlines()
    mapped = [i for i, line in enumerate(lines) if line.endswith("unet.fp32-0.data")]
    assert mapped, "the weights are not mapped"
    for i in mapped:
        resident = next(line for line in lines[i:] if line.startswith("Rss:"))
        assert resident.split()[1] == "0"


@pytest.mark.usefixtures("all_cores")
def test_threads_change_nothing_but_the_time(engines: dict[str, Path]) -> None:
    most, pictures = cpus.available(), []
    for threads in (1, most):
        os.sched_setaffinity(0, CORES)  # OpenVINO has given the thread back the core that it had when it was first used
        pictures.append(picture(engines["fp32"], threads=threads).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_an_engine_in_bf16_does_not_fit_a_cpu_without_it(
    engines: dict[str, Path], copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(engines["default"])
    monkeypatch.setattr(backend, "has_bf16", lambda: False)  # what the library says of such a CPU
    if HAS_BF16:
        with pytest.raises(BundleError, match=r"it computes in bf16, and this CPU does not\); build one: build-engine"):
            Pipeline.load(bundle)
    for asked in ("bf16", "mixed"):
        with pytest.raises(InputError, match=f"inference_precision={asked}: this CPU does not compute in bf16; auto"):
            build_here("demo", tmp_path / "x", backend="openvino", options={"inference_precision": asked}, quiet=True)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
    assert build_here(str(bundle), backend="openvino", chains=TEXT, quiet=True).precision["unet"] == "fp32"
    assert picture(bundle).any()


def test_a_graph_that_openvino_does_not_read(engines: dict[str, Path], copy_of: Copy) -> None:
    bundle = Bundle.open(copy_of(engines["fp32"]))
    executor = selection.open_executor(bundle, selection.select(bundle.open_chain()))
    (bundle.path / "graphs/unet.onnx").write_bytes(b"no graph")
    with pytest.raises(TurbochainError, match=r"^openvino cannot load .*unet\.onnx: "):
        executor.load(["unet"])
    shutil.copy(bundle.path / "graphs/step.onnx", bundle.path / "graphs/vae_decoder.onnx")
    with pytest.raises(BundleError, match=r"graphs/vae_decoder\.onnx: the inputs are .*and bundle\.json says"):
        executor.load(["vae_decoder"])
    assert executor.loaded == frozenset()


def test_it_runs_on_no_gpu(engines: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="device='cuda': openvino runs on 'cpu'"):
        Pipeline.load(engines["fp32"], backend="openvino", device="cuda")


def test_its_option_is_checked_and_kept(engines: dict[str, Path]) -> None:
    said = called("build-engine", engines["fp32"], "--backend", "openvino", "-O", "inference_precision=int4")
    assert said.returncode == 2 and "inference_precision=int4: auto, bf16, mixed, fp32 was expected" in said.stderr
    (path,) = engines["fp32"].glob("engines/*/engine.json")
    written = json.loads(path.read_text())
    assert written["ordered"] == {"inference_precision": "fp32"}
    assert written["key"]["options"] == written["ordered"] | {"int8": "none"}
    assert backends.get("openvino").libraries == ("openvino",)
