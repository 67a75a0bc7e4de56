"""Chains of several sizes in one pipeline: which graphs are in memory, and the same pictures whatever was before; and
a size that does not halve evenly."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import control_nets
import numpy as np
import onnx
import pytest
import small_bundle
from calls import assert_nothing_left, of_chains, output
from conftest import ON, reseal
from here import build_here
from interrupted import SIZE
from safetensors import safe_open
from standin import Runtime, StandIn, pipeline, standing_in
from test_parity import assert_same_picture, load_diffusers, theirs

from turbochain.engines import build
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.verify import verify_bundle

SIZED = ("unet", "vae_decoder")
FIRST, OTHER = "text-to-image", "other"
EVERY = {"text_encoder", "step", *SIZED}
CALL: dict[str, Any] = {"prompt": "a cat", "seed": 3, "output_type": "uint8"}


@pytest.fixture
def two(sd: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A bundle with a second chain whose sized graphs are others of the same files, as those of another size are."""
    path = copy_of(sd)
    shutil.rmtree(path / "engines")
    manifest = json.loads((path / "bundle.json").read_text())
    chain = json.loads(json.dumps(manifest["chains"][FIRST]))
    for stage in chain["stages"]:
        stage["graph"] += "@other" if stage["graph"] in SIZED else ""
    manifest["chains"] = {FIRST: manifest["chains"][FIRST], OTHER: chain}
    manifest["graphs"] |= {f"{name}@other": manifest["graphs"][name] for name in SIZED}
    (path / "bundle.json").write_text(json.dumps(manifest))
    for backend in small_bundle.OPTIONS:
        small_bundle.write_engine(path, backend, list(manifest["graphs"]))
        file, bundle = path / "engines" / backend / "engine.json", Bundle.open(path)
        digests = {name: bundle.open_chain(name).digest for name in (FIRST, OTHER)}
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"checks": {FIRST: [], OTHER: []}, "verified": digests})
        )
    return path


def others(*graphs: str) -> set[str]:
    return {f"{name}@other" for name in graphs}


def check_alternating(pipe: Pipeline, loaded: dict[str, set[str]], chains: Sequence[str] = (OTHER, FIRST)) -> None:
    """Draw the first chain and then these; after each draw these graphs are in memory."""
    expected = pipe(**CALL, chain=FIRST).images
    assert pipe._opened().loaded == EVERY
    for chain in chains:
        np.testing.assert_array_equal(pipe(**CALL, chain=chain).images, expected)
        assert pipe._opened().loaded == loaded[chain], chain


def test_what_copies_weights_is_there_once(two: Path) -> None:
    for keep_all, loaded in ((False, EVERY - {*SIZED}), (True, EVERY)):
        with Pipeline.load(two, engine="openvino", keep_all=keep_all) as pipe:
            check_alternating(pipe, {OTHER: loaded | others(*SIZED)}, [OTHER])


def test_what_is_mapped_stays(two: Path) -> None:
    """ONNX Runtime packs the VAE's weights, and reads the UNet's where they are."""
    both = EVERY | others("unet")
    with Pipeline.load(two, engine="onnxruntime") as pipe:
        check_alternating(pipe, {FIRST: both, OTHER: both - {"vae_decoder"} | others("vae_decoder")})


def test_a_gpu_has_one_size(two: Path) -> None:
    """The graphs that were captured of the other one go with it."""
    with on_the_stand_in(two) as (pipe, runtime):
        check_alternating(pipe, {FIRST: EVERY, OTHER: EVERY - {*SIZED} | others(*SIZED)})
        assert runtime.leaked().count("Executable") == 1


@contextlib.contextmanager
def on_the_stand_in(path: Path) -> Iterator[tuple[Pipeline, Runtime]]:
    with standing_in() as runtime:
        with pipeline(path, StandIn) as pipe:
            yield pipe, runtime
        assert_nothing_left(runtime)


@pytest.mark.full
def test_sizes_in_any_order(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Every task in two sizes, with a history; each picture is that of a pipeline which has drawn nothing else."""
    asked: dict[str, Any] = {
        "steps": [2, 3, 4],
        "scheduler": "DPMSolverMultistepScheduler",
        "size": [(64, 64), (96, 64)],
    }
    tasks = {"tasks": ["text-to-image", "image-to-image", "inpainting"], "precision": "fp32"}
    path = build_here(str(checkpoints["sd"]), tmp_path / "x.bundle", **tasks, **asked, quiet=True, **ON).bundle
    build(str(path), backend="openvino", options={"inference_precision": "fp32"}, quiet=True)
    calls = [call for call in of_chains(path) if call.get("num_inference_steps") != 1]
    assert {call["chain"] for call in calls} == {*Bundle.open(path).manifest.chains}
    assert Bundle.open(path).open_chain().chain.K == 2
    check_what_a_size_adds(path)
    for backend in ("onnxruntime", "openvino"):
        with Pipeline.load(path, backend=backend, keep_all=True) as pipe:
            right = [output(pipe, call).images for call in calls]
        with Pipeline.load(path, backend=backend) as pipe:
            check_in_a_random_order(pipe, calls, right)
        if backend == "onnxruntime":  # whose graphs the stand-in runs
            with on_the_stand_in(path) as (pipe, _):
                check_in_a_random_order(pipe, calls, right)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_further_size_with_controls(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What a ControlNet and a T2I-Adapter make is recorded as a sample; a wrong residual in either graph is found."""
    more: dict[str, Any] = {"steps": [4], "size": [(64, 64), (96, 64)], "lora_rank": 4}
    control_nets.build(family, checkpoints[family], tmp_path, **more)
    path = tmp_path / "made.bundle"
    assert "excerpts" in Bundle.open(path).manifest.requires
    _, checks = verify_bundle(path)
    assert all(check.passed for chain in checks.values() for check in chain)
    further = checks["text-to-image@96x64"]
    nets = {"controlnet_embedding-canny@96x64", "controlnet-canny@96x64", "t2i_adapter-sketch@96x64"}
    assert nets | {"unet@96x64", "unet+lora@96x64"} <= {check.stage for check in further}
    with safe_open(path / "reference.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sampled = {name.partition("/")[0] for name in shapes if "/sampled/" in name}
    whole = {name.partition("/")[0] for name in shapes if name.partition("/")[2] == "mid_block_residual"}
    assert sampled and whole and not sampled & whole
    assert {shapes[f"{i}/mid_block_residual"][0] for i in whole} == {1, 2}
    for graph, change in (("controlnet-canny@96x64", made_larger), ("unet@96x64", read_larger)):
        other = tmp_path / f"{graph}.bundle"
        subprocess.run(["cp", "-r", path, other], check=True)
        proto = onnx.load(other / f"graphs/{graph}.onnx", load_external_data=False)
        change(proto.graph)
        onnx.save(proto, other / f"graphs/{graph}.onnx")
        reseal(other)
        _, checks = verify_bundle(other, chain="text-to-image@96x64")
        refused = {check.stage for check in checks["text-to-image@96x64"] if not check.passed}
        assert graph in refused and refused <= {graph, "unet@96x64", "unet+lora@96x64", "image"}


def made_larger(graph: Any) -> None:
    """Make one residual 1% larger."""
    name = graph.output[1].name
    (node,) = (node for node in graph.node if name in node.output)
    node.output[[*node.output].index(name)] = "right"
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "factor"))
    graph.node.append(onnx.helper.make_node("Mul", ["right", "factor"], [name]))


def read_larger(graph: Any) -> None:
    """Read one residual as 1% larger."""
    name = "down_block_residual_1"
    for node in graph.node:
        node.input[:] = ["larger" if read == name else read for read in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "factor"))
    graph.node.insert(0, onnx.helper.make_node("Mul", [name, "factor"], ["larger"]))


@pytest.mark.full
def test_latents_that_do_not_halve_evenly(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    order: dict[str, Any] = {"size": SIZE, "tasks": ["text-to-image"], "precision": "fp32", "quiet": True}
    path = build_here(str(checkpoints["sd"]), tmp_path / "x.bundle", **order, **ON).bundle
    build_here(str(path), backend="openvino", options={"inference_precision": "fp32"}, quiet=True)
    call = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2}
    expected = theirs(load_diffusers(checkpoints["sd"]), call, SIZE)
    for backend in ("onnxruntime", "openvino"):
        with Pipeline.load(path, backend=backend) as pipe:
            assert_same_picture(pipe(**call, output_type="uint8").images, expected)


def check_what_a_size_adds(path: Path) -> None:
    """No weights and no tables, but graphs, and the tensors of fewer recorded calls than the first size has."""
    added = [file for file in path.rglob("*@96x64*") if file.is_file()]
    assert {file.suffix for file in added} == {".onnx", ".json"}
    assert 0 < sum(file.stat().st_size for file in added) < 500_000
    bundle = Bundle.open(path)
    for chain in (name for name in bundle.manifest.chains if "@" not in name):
        first, second = (
            sum(array.nbytes for case in reference.read(bundle, name).cases for array in case.tensors.values())
            for name in (chain, f"{chain}@96x64")
        )
        assert 0 < second < first


def check_in_a_random_order(pipe: Pipeline, calls: list[dict[str, Any]], right: list[Any]) -> None:
    for i in np.random.default_rng(0).permutation(len(calls)):
        np.testing.assert_array_equal(output(pipe, calls[i]).images, right[i], err_msg=str(calls[i]))
