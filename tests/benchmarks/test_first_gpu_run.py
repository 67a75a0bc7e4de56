"""The steps of the first run on a GPU find nothing wrong on the stand-in, and the runner keeps its limits."""

import importlib
import inspect
import json
import os
import re
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HALF, BundleFactory
from cuda.bindings import runtime as real
from standin import Runtime, standing_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch_stand_in import AtLaunch, OnStandIn

from first_gpu_run import (
    chains,
    fault,
    full_size,
    functions,
    hollow,
    inductor,
    machine,
    miniatures,
    onnxruntime,
    runner,
    upsampling,
)
from first_gpu_run.results import FILE, Report, read, update
from first_gpu_run.runner import Step
from turbochain.runtime import Bundle
from turbochain.runtime.backends import cuda
from turbochain.runtime.checks import reference
from turbochain.runtime.errors import TurbochainError

COMPILED = {
    "sd": ["vae_decoder", "unet", "text_encoder"],
    "sdxl": ["vae_decoder", "unet", "text_encoder", "text_encoder_2"],
}
"""Family → the graphs that Inductor compiles, in their order."""
FEW = miniatures.Counts(repeats=2, pictures=2, loads=1, timed=2, steps=(1, 2))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / FILE, "step")


def results(report: Report) -> dict[str, Any]:
    return read(report.path)["steps"]["step"]["results"]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """A machine whose GPU is the stand-in; nothing may be left of a step, and nothing wrong done."""

    def host_function(self: Runtime, stream: Any, function: Any, data: Any) -> tuple[Any]:
        self.host_function(stream, lambda: None)
        return (real.cudaError_t.cudaSuccess,)

    monkeypatch.setattr(Runtime, "cudaLaunchHostFunc", host_function, raising=False)
    with standing_in(3) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def prepared(bundle_of: BundleFactory, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes, of the shared bundles; the miniatures stand for the full-size checkpoints."""
    folder = tmp_path_factory.mktemp("prepared")
    for family in FAMILIES:
        hollow.of_bundle(Bundle.open(bundle_of(family)), folder / f"{family}.bundle")
        (folder / checkpoints[family].name).symlink_to(checkpoints[family])
    return folder


def test_every_function_does_what_it_should(runtime: Runtime, report: Report) -> None:
    functions.run(report, Path())
    found = results(report)
    assert found.keys() == {*functions.WORKS, *functions.REFUSED, "the same after all of it"}
    assert [name for name, of in found.items() if not of or "error" in (of if isinstance(of, dict) else {})] == []
    assert found["a function of the host"]["said"] == "CudaError: it calls a function of the host"
    assert "CudaError: it copies from" in found["page-locked memory of another"]["said"]
    called = {*re.findall(r"\bcuda[A-Z]\w+(?=[(\"])", Path(inspect.getfile(cuda)).read_text())}
    of_errors = {"cudaGetErrorString", "cudaGetLastError", "cudaDriverGetVersion", "cudaRuntimeGetVersion"}
    assert called - of_errors <= {*runtime.calls}  # every function of cuda.py
    assert found["capture"] == {"nodes": 3} and found["memory comes back"]["missing"] == 0
    assert (runtime.problems(), runtime.leaked()) == ([], [])


@pytest.mark.parametrize("family", HALF)
def test_miniatures_are_what_diffusers_made(
    runtime: Runtime, report: Report, prepared: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = reference.read

    def first(*which: Any, **more: Any) -> reference.Reference:
        found = every(*which, **more)
        return replace(found, cases=found.cases[:1])  # all of them take ten seconds

    monkeypatch.setattr(reference, "read", first)
    miniatures.against_diffusers(report, prepared, partial(OnStandIn, runtime), family)
    found = results(report)
    for precision, metric in (("fp32", "max_abs"), ("fp16", "psnr")):
        for chain, its_own in (("text-to-image", "unet"), ("image-to-image", "vae_encoder")):
            checks = found[f"{family} {precision}, {chain}, against diffusers"]
            assert checks["passed"] and {f"{its_own}: relative_l2", f"image: {metric}"} <= checks.keys()
    assert runtime.problems() == []


def test_the_executor_is_right(runtime: Runtime, report: Report, prepared: Path) -> None:
    miniatures.others(report, prepared, partial(OnStandIn, runtime), "sd", FEW)
    found = {name.removeprefix("sd, "): of for name, of in results(report).items()}
    right = {"uncaptured": None, "same_as_stages": True, "same_with_known_prompt": True}
    assert found["captured and stage by stage"] == {"1 steps": right, "2 steps": right}
    assert found["host time"]["gpu_seconds"] > 0
    assert found["two pipelines"] is found["four threads"] is True
    assert found["repeats"] == {"repeats": 2, "different": 0}
    assert found["memory"] == {"pictures": 2, "missing_bytes": 0} and found["loads"] == {"loads": 1, "missing_bytes": 0}
    assert found.keys() == miniatures.WORKS.keys() and runtime.problems() == []


def test_a_module_of_another_shape_is_refused(runtime: Runtime, prepared: Path) -> None:
    """A copy would spread it over the output, silently."""
    mini = miniatures.miniature(prepared, partial(OnStandIn, runtime), "sd", "fp32")
    mini.made["unet"].forward = lambda *_: torch.zeros(1)  # type: ignore[method-assign]
    with pytest.raises(TurbochainError, match=r"unet makes prediction as torch.float32 \[1\]"), mini.loaded() as pipe:
        miniatures.draw(pipe)


def test_a_launch_of_a_graph_runs_no_python(runtime: Runtime, prepared: Path) -> None:
    """On a GPU only the kernels run again: all that differs from picture to picture has to be in memory."""
    mini = miniatures.miniature(prepared, partial(OnStandIn, runtime), "sd", "fp32")
    ran: list[int] = []
    for module in mini.made.values():
        module.register_forward_hook(lambda *_: ran.append(1))
    with mini.loaded() as pipe:
        chains.draw(pipe)
        before = len(ran)
        made = [chains.draw(pipe, seed=seed, prompt=f"prompt {seed}").images for seed in (1, 2)]
        assert len(ran) == before > 0
    with mini.loaded() as pipe:
        right = [chains.draw(pipe, seed=seed, prompt=f"prompt {seed}").images for seed in (2, 1)][::-1]
    assert (made[0] == right[0]).all() and (made[1] == right[1]).all() and (made[0] != made[1]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_stage_goes_to_the_host_or_comes_from_it(runtime: Runtime, prepared: Path, family: str) -> None:
    """On the meta device a value cannot be read, and a tensor of the CPU's is seen: a capture would be refused."""
    mini = miniatures.miniature(prepared, partial(OnStandIn, runtime), family, "fp16")
    for name, module in mini.made.items():
        module.to("meta")
        inputs = mini.bundle.manifest.graphs[name].inputs
        given = [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in inputs]
        with torch.no_grad(), OfTheHost() as found:
            module(*given)
        assert found.operations == [], name


class OfTheHost(TorchDispatchMode):
    """Notes the operations that have to do with memory of the host."""

    operations: list[str]

    def __enter__(self) -> Any:
        self.operations = []
        return super().__enter__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_iter((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        self.operations += [str(operation)] * any(t.device.type == "cpu" for t in tensors)
        return made


def test_after_a_fault_every_call_says_so(runtime: Runtime, report: Report, prepared: Path) -> None:
    def cause() -> None:
        runtime.sticky = real.cudaError_t.cudaErrorIllegalAddress

    fault.run(report, prepared, partial(OnStandIn, runtime), cause)
    found = results(report)
    assert found["closed"] is True
    for i in (1, 2, 3):
        assert found[f"call {i} after it"].startswith("CudaFault: the GPU cannot be used by this process any more")


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_full_size(runtime: Runtime, report: Report, prepared: Path, family: str) -> None:
    """With the tables that were made of the drawn models, and no reference: the picture is diffusers'."""
    place = partial(OnStandIn, runtime)
    full_size.run(report, prepared, f"{family}-turbo-mini", place, size=64, precision="fp32", runs=1)
    found = results(report)
    assert found["ours"]["uncaptured"] is None and found["ours"]["one_graph"]["seconds"] > 0
    assert found["PSNR"].keys() == full_size.WAYS.keys()
    assert min(found["PSNR"].values()) > 60
    assert all(found[f"diffusers, {name}"]["seconds"] > 0 for name in full_size.WAYS)
    texts = {"sd": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"}}[family]
    assert {*found["ours"]["stages"]} == {*texts, "unet", "step", "vae_decoder"}
    assert runtime.problems() == []


@pytest.mark.parametrize("family", HALF)
def test_compiled_stages(runtime: Runtime, report: Report, prepared: Path, family: str) -> None:
    compiled: list[str] = []

    def note(made: Any, bundle: Bundle, device: torch.device) -> Any:
        compiled.extend(made)
        return made

    given = {"size": 64, "precision": "fp32", "runs": 1, "compiled": note}
    inductor.run(report, prepared, f"{family}-turbo-mini", partial(OnStandIn, runtime), **given)
    found = results(report)
    assert compiled == COMPILED[family]
    assert found["compiling unet"]["seconds"] >= 0
    for name in compiled:
        assert found[f"with {name} compiled"]["uncaptured"] is None and found[f"PSNR with {name} compiled"] == 120
    assert runtime.problems() == []


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compiled_by_inductor(runtime: Runtime, report: Report, prepared: Path, family: str) -> None:
    """For a CPU, with the options that it has on a GPU: each stage is one graph, and the picture stays."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    place = partial(AtLaunch, runtime)
    inductor.run(report, prepared, f"{family}-turbo-mini", place, size=64, precision="fp32", runs=1)
    found = results(report)
    for name in COMPILED[family]:
        assert found[f"with {name} compiled"]["uncaptured"] is None and found[f"PSNR with {name} compiled"] > 60
    assert counted["stats"]["unique_graphs"] == len(COMPILED[family]) and not counted["graph_break"]
    assert runtime.problems() == []


def test_the_transposed_convolution_is_equal(report: Report) -> None:
    upsampling.run(report, Path(), "cpu", [(8, 6)], torch.float32, runs=1)
    found = results(report)
    assert len(found) == 2
    for of in found.values():
        assert of["apart_error"] < 1e-6 and of["merged_error"] < 1e-6 and of["ratio"] > 0
    torch.manual_seed(0)
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5, 7), (4, 3, 3, 3), (4,)))
    pair = torch.nn.functional.conv2d(torch.nn.Upsample(scale_factor=2)(x), w, b, padding=1)
    one = torch.nn.functional.conv_transpose2d(x, upsampling.transposed(w), b, stride=2, padding=1)
    torch.testing.assert_close(one, pair, rtol=1e-12, atol=1e-12)


def test_without_onnxruntime_gpu_the_step_says_so(report: Report, prepared: Path) -> None:
    onnxruntime.run(report, prepared)
    assert "'turbochain[cuda]'" in results(report)["left out"]


def test_the_runner_keeps_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST", 0.1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    steps = (Step("functions", 30), Step("upsampling", 0.3), Step("onnxruntime", 30), Step("fault", 30))
    clock = iter([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 30.0, 50.0])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock, 60.0))
    assert runner.run(tmp_path, tmp_path / "out", "abc", steps, budget=40) == 3
    found = json.loads((tmp_path / "out" / FILE).read_text())
    assert found["commit"] == "abc" and found["budget_seconds"] == 40
    status = {name: of["status"] for name, of in found["steps"].items()}
    assert status == {
        "functions": "failed with exit status 1; log.txt says why",
        "upsampling": "stopped after 0 s",
        "onnxruntime": "done",
        "fault": "left out: the time was spent",
    }
    assert "left out" in found["steps"]["onnxruntime"]["results"]
    assert "NoGpu" in (tmp_path / "out" / "log.txt").read_text()


def test_a_step_that_cannot_be_ended_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for the GPU's driver cannot."""
    left: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(runner.os, "killpg", lambda group, signal: left.append(group))
        patch.setattr(runner, "LEAST", 0.1)
        patch.setattr(runner, "PATIENCE", 0.1)
        assert runner.run(tmp_path, tmp_path / "out", "abc", [Step("upsampling", 0.2)]) == 1
    assert read(tmp_path / "out" / FILE)["steps"]["upsampling"]["status"] == "stopped after 0 s"
    (process,) = left
    os.killpg(process, signal.SIGKILL)  # ProcessLookupError if it was waited for


def test_a_step_is_running_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file says if the whole run is killed meanwhile."""
    seen: list[str] = []

    def look(given: dict[str, Any], *_: object) -> str:
        seen.append(read(Path(given["results"]))["steps"][given["step"]]["status"])
        return "done"

    monkeypatch.setattr(runner, "_one", look)
    assert runner.run(tmp_path, tmp_path / "out", None, [Step("functions", 30)]) == 0 and seen == ["running"]


def test_kernels_are_packed_if_there_is_time(tmp_path: Path) -> None:
    folder, archive = tmp_path / "inductor", tmp_path / "inductor.tar.gz"
    folder.mkdir()
    (folder / "kernel.so").write_bytes(b"kernel")
    runner.pack(folder, -1)
    assert (folder / "kernel.so").exists() and not archive.exists()
    runner.pack(folder, 60)
    assert not folder.exists()
    with tarfile.open(archive) as packed:
        assert packed.extractfile("inductor/kernel.so").read() == b"kernel"  # type: ignore[union-attr]


def test_what_measures_is_written_down(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that PyTorch and nvidia-smi tell of."""
    told = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, total_memory=24 * 2**30, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$1 $2" in *GPU-1-2*driver_version*) echo 580.1;; *) echo 1,2,3,4,5,6,7;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    update(report.path, "commit", value="abc")
    machine.run(report, Path())
    found = read(report.path)["run"]
    assert found["commit"] == "abc" and found["versions"]["torch"] == torch.__version__ and found["machine"]["cores"]
    gpu = ("name", "compute_capability", "memory_bytes", "driver")
    assert [found["gpu"][name] for name in gpu] == ["NVIDIA L4", "8.9", 24 * 2**30, "580.1"]
    assert results(report)["clocks"]["clocks.sm"] == "1"


def test_a_figure_is_on_disk_at_once_and_an_error_loses_only_itself(report: Report) -> None:
    def fail() -> None:
        raise ValueError("no")

    report.add("first", {"a": float("nan"), "b": (1.23456789, "c")})
    assert results(report) == {"first": {"a": "nan", "b": [1.2346, "c"]}}
    assert report.attempt("second", fail) is None and report.attempt("third", lambda: 3) == 3
    assert results(report)["second"]["error"] == "ValueError: no" and results(report)["third"] == 3
    update(report.path, "run", value={"commit": "abc"})
    assert results(report)["third"] == 3


def test_every_step_has_its_module() -> None:
    for step in runner.STEPS:
        assert callable(importlib.import_module(f"first_gpu_run.{step.module or step.name}").run)
    assert len({step.name for step in runner.STEPS}) == len(runner.STEPS) and runner.BUDGET == 720
