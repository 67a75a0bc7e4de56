"""TensorRT's builder, for real and without a GPU: TensorRT-RTX parses and builds every graph for another machine."""

import dataclasses
import gc
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import control_nets
import image_graphs
import onnx
import pytest
from conftest import HALF, ON, SIZE, BundleFactory, called, command
from cuda_forms import assert_all_on_gpu
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from here import build_here

from turbochain.engines import build, options
from turbochain.engines.backends import tensorrt
from turbochain.export.families import common
from turbochain.export.remedies import Remedy
from turbochain.export.sources import synthetic
from turbochain.runtime import BackendMissing, Bundle, TurbochainError
from turbochain.runtime.backends.contract import Device
from turbochain.runtime.backends.tensorrt import (
    keep_kernels,
    kernels_file,
    listen,
    logger,
    read_kernels,
    target,
    trt,
)
from turbochain.runtime.bundle import hashing, manifest, strict_json
from turbochain.runtime.bundle.manifest import Engine

BUILD = Path(sys.executable).with_name("build-engine")
AHEAD = ("--backend", "tensorrt", "--target", "sm89")
ARITHMETIC = ("start", "step", "step+guidance")
GRAPHS = ("text_encoder", "unet", "vae_encoder", "vae_decoder", *ARITHMETIC)
L4 = manifest.Gpu("NVIDIA L4", "8.9", 24 * 2**30)
NO_DRIVER = "there is no NVIDIA driver on this machine"

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


def serialize(
    path: Path, graph: str, progress: tensorrt.Progress = lambda done, total: None, **given: object
) -> tuple[int, str]:
    """The size of a serialized engine, and everything that TensorRT said while it was built for sm89."""
    said: list[str] = []
    chosen = options.resolve("tensorrt", given)
    serialized = tensorrt.serialize(
        path, graph, chosen, target("sm89"), Path("/nowhere"), progress, lambda severity, text: said.append(text)
    )
    return serialized.nbytes, "\n".join(said)


def attentions(path: Path, said: str) -> list[tuple[tuple[int, ...], str]]:
    """Shape [batch, heads, queries, keys] and dtype of every softmax, as TensorRT's parser met it."""
    found = re.findall(r"\[Softmax\] inputs: \[\S+ -> \(([\d, ]+)\)\[(\w+)\]\]", said)
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Softmax"]
    assert len(found) == len(nodes)
    return [(tuple(map(int, shape.split(","))), dtype) for shape, dtype in found]


def fusible(shape: tuple[int, ...], dtype: str) -> bool:
    """TensorRT fuses what is fp16 and has several heads; over a single key there is nothing to compute."""
    _, heads, _, keys = shape
    return dtype == "HALF" and heads > 1 and keys > 1


def check_graph(path: Path, graph: str) -> tuple[int, int]:
    """Build a graph; how many attentions it has and how many of them are fused, after checking that all can be are."""
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "_REPORT_EVERY", 0)  # a miniature may take less time than one report
        size, said = serialize(path, graph, lambda done, total: seen.append((done, total)))
    assert size > 1000
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1), shares
    assert len(set(shares)) > 4, shares
    layers = re.findall(r"^Name: ([^,]+), LayerType: \w+", said, re.M)
    found = attentions(path, said)
    fused = sum("mha" in layer for layer in layers)
    assert layers and fused == sum(fusible(*attention) for attention in found), (layers, found)
    return len(found), fused


@pytest.mark.parametrize("family", HALF)
def test_every_graph_is_built_and_every_attention_fused(
    family: str, bundle_of: BundleFactory, checkpoints: dict[str, Path]
) -> None:
    bundle = Bundle.open(bundle_of(family, "fp16"))
    counts = {name: check_graph(bundle.path / graph.file, name) for name, graph in bundle.manifest.graphs.items()}
    theirs = UNet2DConditionModel.from_pretrained(checkpoints[family], subfolder="unet").modules()
    attentions = sum(isinstance(module, Attention) for module in theirs)
    assert counts["unet"] == (attentions, attentions) and attentions >= 8
    assert counts["vae_decoder"] == counts["vae_encoder"] == (1, 0)  # theirs have one head
    assert {counts[graph] for graph in ARITHMETIC} == {(0, 0)}
    assert all(total == fused > 0 for name, (total, fused) in counts.items() if name.startswith("text"))


@pytest.mark.full
def test_controlnets_and_t2i_adapters_are_built(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    control_nets.build("sd", checkpoints["sd"], tmp_path, precision="fp16", tasks=["text-to-image"])
    bundle = Bundle.open(tmp_path / "made.bundle")
    for name in ("unet", "controlnet-canny", "controlnet_embedding-canny", "t2i_adapter-sketch", "t2i_scale"):
        attentions, fused = check_graph(bundle.path / bundle.manifest.graphs[name].file, name)
        assert fused == attentions, name


@pytest.mark.full
def test_sd15s_unet_is_built(tmp_path: Path) -> None:
    """With 1x1 convolutions around its attentions. ONNX Runtime's form of it runs whole."""
    synthetic.write_checkpoint("sd15-mini", checkpoint := tmp_path / "checkpoint")
    config = checkpoint / "unet/config.json"  # with heads of 16 values: those of 8, as no real model has, are not fused
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 2}))
    how: dict[str, Any] = {"precision": "fp16", "size": SIZE, "steps": [2], "tasks": ["text-to-image"], "quiet": True}
    bundle = Bundle.open(build_here(str(checkpoint), tmp_path / "x.bundle", **how, **ON).bundle)
    path = bundle.path / bundle.manifest.graphs["unet"].file
    attentions, fused = check_graph(path, "unet")
    assert attentions == fused >= 8
    assert_all_on_gpu(path, tmp_path)


ATTENTION = """
<ir_version: 10, opset_import: ["": 21]>
attention (float16[1,{length},{width}] x, float16[1,{keys},{width}] y, float16[{width},{width}] query,
           float16[{width},{width}] key, float16[{width},{width}] value) => (float16[1,{length},{width}] z)
<int64[4] split = {{1, -1, {heads}, {size}}}, int64[3] join = {{1, -1, {width}}}> {{
    q0 = MatMul (x, query)
    k0 = MatMul (y, key)
    v0 = MatMul (y, value)
    q1 = Reshape (q0, split)
    k1 = Reshape (k0, split)
    v1 = Reshape (v0, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)
    shares = Softmax <axis = -1> (scores)
    z0 = MatMul (shares, v)
    z1 = Transpose <perm = [0, 2, 1, 3]> (z0)
    z = Reshape (z1, join)
}}"""


@pytest.mark.parametrize("size", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", [77, 1024])
def test_an_attention_of_every_real_head_size_is_fused(size: int, keys: int, tmp_path: Path) -> None:
    """SD 1.5 has heads of 40, 80 and 160 values, the others of 64; miniatures have smaller ones."""
    heads = 8
    text = ATTENTION.format(length=1024, keys=keys, heads=heads, size=size, width=heads * size)
    onnx.save(onnx.parser.parse_model(text), path := tmp_path / "attention.onnx")
    assert check_graph(path, "attention") == (1, 1)


@pytest.mark.full
def test_an_encoder_that_reads_the_scale_alone_is_built(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    opened = image_graphs.checkpoint(checkpoints["sdxl"])
    specs = image_graphs.own(opened, common.PLAIN_ENCODER)
    (graph,) = image_graphs.traced(opened, specs, image_graphs.SQUARE, tmp_path, Remedy("fp16")).values()
    assert check_graph(tmp_path / graph.file, common.PLAIN_ENCODER) == (1, 0)
    assert_all_on_gpu(tmp_path / graph.file, tmp_path)


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder and the hash of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "a folder"
        for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def ahead(bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD miniature with an engine for the GPUs of another machine and no other. Tests must not change it."""
    bundle = tmp_path_factory.mktemp("ahead") / "ahead.bundle"
    shutil.copytree(bundle_of("sd", "fp16"), bundle)
    shutil.rmtree(bundle / "engines")
    done = command("build-engine", bundle, *AHEAD, "-O", "builder_optimization_level=1", "-O", "max_aux_streams=0")
    assert done.returncode == 0, done
    assert "any GPU of the architecture (sm89)" in done.stderr and ": built in " in done.stdout
    assert "unverified: it is checked when it is first loaded on such a machine" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()[2 : 2 + len(GRAPHS)]]
    assert {row[0]: row[1] for row in rows} == {g: "fp32" if g in ARITHMETIC else "fp16" for g in GRAPHS}
    return bundle


def test_what_is_installed(ahead: Path) -> None:
    (folder,) = (ahead / "engines").iterdir()
    assert {p.name for p in folder.iterdir()} == {"engine.json", *(f"{g}.engine" for g in GRAPHS)}
    assert [p.name for p in ahead.parent.iterdir()] == [ahead.name]  # no timing cache, as nothing is timed
    made = strict_json.read(Engine, folder / "engine.json")
    hashing.check_all(folder, made.files, full=True)
    assert set(made.files) == {f"{g}.engine" for g in GRAPHS} and made.checks == {}
    assert made.key.gpu == manifest.Gpu(None, "8.9", None) and made.key.library.startswith("tensorrt-rtx")
    assert made.key.options.keys() == tensorrt.OPTIONS.keys()
    assert made.ordered == {"builder_optimization_level": 1, "max_aux_streams": 0}
    assert made.key.options.items() > made.ordered.items()
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(made.key), sort_keys=True).encode()).hexdigest()
    assert folder.name == f"tensorrt-sm89-{digest[:12]}"


def test_a_second_build_does_nothing(ahead: Path) -> None:
    before = listing(ahead)
    again = build(
        str(ahead),
        backend="tensorrt",
        target="sm89",
        options={"builder_optimization_level": 1, "max_aux_streams": "0", "tiling_optimization_level": "none"},
        quiet=True,
    )
    assert again.phases == [] and again.checks == {} and listing(ahead) == before


def test_it_says_that_it_is_unverified_and_why_it_does_not_fit(ahead: Path) -> None:
    shown = called("turbochain", "inspect", ahead).stdout
    assert f"does not fit: {NO_DRIVER}" in shown and "unverified: " in shown and "sm89" in shown
    assert "builder_optimization_level=1, max_aux_streams=0" in shown and "one that fits" not in shown
    for line in (("generate", ahead, "a cat"), ("verify", ahead)):
        done = called("turbochain", *line)
        assert done.returncode == 2 and NO_DRIVER in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_leaves_nothing(ahead: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    """In a terminal, which sends it to every process, while TensorRT is building, as the bar says."""
    bundle = copy_of(ahead)
    before = listing(tmp_path)
    screen, terminal = pty.openpty()
    line = [BUILD, bundle, *AHEAD, "-O", "builder_optimization_level=5", "-v"]  # the longest to build
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # these tests may run where it is ignored
    own: Any = {"start_new_session": True, "preexec_fn": heed}
    builder = subprocess.Popen(line, stdout=terminal, stderr=terminal, **own)
    os.close(terminal)
    shown, interrupted = "", False
    try:
        while text := os.read(screen, 10000).decode(errors="replace"):
            shown += text
            if not interrupted and re.search(r"compile unet +\[[#-]+\] +\d?\d% ", shown):
                os.killpg(builder.pid, signal.SIGINT)
                interrupted = True
    except OSError:  # nobody has the terminal open any more
        pass
    os.close(screen)
    assert builder.wait(60) == 130 and "Traceback" not in shown and "KeyboardInterrupt" not in shown, shown
    assert re.search(r"compile unet +cancelled", shown) and shown.rstrip().endswith("build-engine: cancelled")
    assert listing(tmp_path) == before


def retype(bundle: Path, graph: str, operators: dict[str, str]) -> list[str]:
    """Put other operators in a graph; how its nodes are then called. The bundle's hashes stay true."""
    path = bundle / "graphs" / f"{graph}.onnx"
    proto = onnx.load(path, load_external_data=False)
    changed = [node for node in proto.graph.node if node.op_type in operators]
    for node in changed:
        node.op_type = operators[node.op_type]
    path.write_bytes(proto.SerializeToString())
    description = json.loads((bundle / "bundle.json").read_text())
    description["files"][f"graphs/{graph}.onnx"] = vars(hashing.describe(path))
    (bundle / "bundle.json").write_text(json.dumps(description))
    return [f"node {node.name} ({node.op_type})" for node in changed]


def test_operators_that_it_lacks_are_all_named(ahead: Path, copy_of: Any, tmp_path: Path) -> None:
    bundle = copy_of(ahead)
    nodes = retype(bundle, "text_encoder", {"Gelu": "Bernoulli", "Softmax": "Det"})
    before = listing(tmp_path)
    done = called("build-engine", bundle, *AHEAD)
    told = "; ".join(f"{node}: unsupported node" for node in nodes)
    expected = f"build-engine: error: TensorRT cannot read the graph text_encoder: {told}"
    assert len(nodes) == 6 and (done.returncode, done.stderr.splitlines()[-1]) == (1, expected)
    assert listing(tmp_path) == before


def test_what_it_cannot_build_is_said_in_its_words(ahead: Path, copy_of: Any, tmp_path: Path) -> None:
    """TensorRT-RTX comes without the lean runtime that a version-compatible engine holds."""
    bundle = copy_of(ahead)
    before = listing(tmp_path)
    for option, expected in {
        "version_compatible=true": r"TensorRT cannot build text_encoder: .*libnvinfer_lean",
        "hardware_compatibility=ampere_plus": r"hardware_compatibility: TensorRT-RTX has none; build with --target",
    }.items():
        done = called("build-engine", bundle, *AHEAD, "-O", option)
        assert done.returncode in (1, 2) and re.search(expected, done.stderr.splitlines()[-1]), done
        assert listing(tmp_path) == before


def test_what_progress_raises_stops_the_build(bundle_of: BundleFactory) -> None:
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if done:
            raise ZeroDivisionError(f"at {done}")

    with pytest.raises(ZeroDivisionError, match=r"at \d+"):
        serialize(bundle_of("sd", "fp16") / "graphs/text_encoder.onnx", "text_encoder", progress)
    assert 0 < calls[-1] < 1000


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    for rewrite, expected in (
        (True, "x.onnx is not an ONNX graph"),
        (False, "TensorRT cannot read the graph unet: .*"),
    ):
        with pytest.raises(TurbochainError, match=expected):
            serialize(tmp_path / "x.onnx", "unet", rewrite=rewrite)


def test_without_onnx_it_says_what_to_install(bundle_of: BundleFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("turbochain.engines.forms")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    path = bundle_of("sd", "fp16") / "graphs/step.onnx"
    with pytest.raises(
        BackendMissing, match=r"onnx_ir is not installed: pip install .*, or build with -O rewrite=false"
    ):
        serialize(path, "step")
    assert serialize(path, "step", rewrite=False)[0] > 1000


def test_one_logger_hears_everything_and_repeats_nothing(bundle_of: BundleFactory, tmp_path: Path) -> None:
    """TensorRT keeps the first logger of a process and its pointer, also if that was freed."""
    made = logger()
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    for name in ("one", "two"):
        with pytest.raises(TurbochainError) as caught:
            serialize(tmp_path / "x.onnx", name, rewrite=False)
        assert str(caught.value).startswith(f"TensorRT cannot read the graph {name}: ")
    path = bundle_of("sd", "fp16") / "graphs/step.onnx"
    said = []
    for _ in range(2):
        gc.collect()
        with listen() as errors:
            said.append(serialize(path, "step")[1])
        assert errors.errors == [] and logger() is made
    assert all(len(re.findall("^Name: ", text, re.M)) == 1 and "differs from one already" not in text for text in said)
    with listen() as outer:
        with listen() as inner:
            made.log(trt.ILogger.ERROR, "told while both listen")
        made.log(trt.ILogger.ERROR, "told when one has left")
    assert inner.errors == ["told while both listen"] and str(outer) == "; ".join(outer.errors)
    assert outer.errors == [*inner.errors, "told when one has left"]


def test_what_an_echo_raises_does_not_reach_tensorrt() -> None:
    def echo(severity: str, text: str) -> None:
        raise BrokenPipeError

    with listen(echo) as said:
        logger().log(trt.ILogger.ERROR, "a complaint")
    assert str(said) == "a complaint"


def test_compiled_kernels_are_kept_for_one_gpu_library_and_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What there is to see of them without a GPU: no others are ever given to TensorRT."""
    names = {kernels_file("unet", Device("cuda", 0, gpu)) for gpu in (L4, manifest.Gpu(None, "8.9", None))}
    assert len(names) == 2 and all(re.fullmatch(r"unet\.[\w-]+\.kernels", name) for name in names)
    path = tmp_path / "engine" / "unet.kernels"
    assert read_kernels(path, "this") is None and not caplog.records
    keep_kernels(path, memoryview(b"compiled"), "this")
    assert read_kernels(path, "this") == b"compiled" and [p.name for p in path.parent.iterdir()] == [path.name]
    whole = path.read_bytes()
    for data, purpose in (
        (whole, "that"),
        (whole[:-1], "this"),
        (whole[:33] + b"!" + whole[34:], "this"),
        (b"", "this"),
    ):
        path.write_bytes(data)
        caplog.clear()
        assert read_kernels(path, purpose) is None
        assert caplog.messages == [f"TensorRT compiles kernels again: {path} is damaged, or not for {purpose}"]
    caplog.clear()
    keep_kernels(Path("/proc/none/x.kernels"), memoryview(b"compiled"), "this")
    assert caplog.messages[0].startswith("TensorRT compiles kernels at each load: cannot write /proc/none/x.kernels")


def config() -> tuple[Any, Any]:
    builder = trt.Builder(logger())
    return builder, builder.create_builder_config()


def test_the_timing_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What there is to see of it without a GPU: that it is whole or not used, and never stops a build."""
    path = tensorrt.timing_file(tmp_path / "shared", target("sm89"))
    assert path.name.startswith("tensorrt-rtx") and path.name.endswith("sm89.timings")
    owner, first = config()
    tensorrt.load_timings(first, path)
    tensorrt.save_timings(first, path)
    whole = path.read_bytes()
    owner, second = config()
    tensorrt.load_timings(second, path)
    assert not caplog.records and len(whole) > 32 and [p.name for p in path.parent.iterdir()] == [path.name]
    for damaged in (b"nonsense", whole[:-1], whole[:40] + b"\0" + whole[41:], b""):
        path.write_bytes(damaged)
        caplog.clear()
        owner, again = config()
        tensorrt.load_timings(again, path)
        assert caplog.messages == [f"the timing cache {path} is damaged: every kernel is timed again"]
        tensorrt.save_timings(again, path)
        assert path.read_bytes() == whole
    caplog.clear()
    tensorrt.load_timings(second, tmp_path)
    tensorrt.save_timings(second, Path("/proc/none/x.timings"))
    unread, unkept = caplog.messages
    assert f"{tmp_path} cannot be read (Is a directory)" in unread and "are not kept: " in unkept and owner
