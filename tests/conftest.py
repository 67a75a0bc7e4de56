"""Miniature checkpoints of the true architecture, and bundles built from them once per session.

The session runs in two processes (`make test`), which share the checkpoints and the bundles. With `--bundles FOLDER`
they are also kept for the next session, in a folder named after all that they depend on (`kept.py`).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a thread for each process is what two cores have

import contextlib
import dataclasses
import fcntl
import functools
import gc
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import calls
import here
import interrupted as interruption
import kept
import lora_files
import lowered
import numpy as np
import outside
import pytest
import torch
import torch.fx.config
from _pytest.mark import ParameterSet
from here import build_here
from kept import locked
from torch._export import utils as exported_utils
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from turbochain.engines import cli
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.commands import main
from turbochain.runtime.inputs import feeds

if TYPE_CHECKING:
    from serving import Serving

# Each export lists the exporter's 700 functions anew, which takes as long as the smallest graphs.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
exported_utils._materialize_cpp_cia_ops = functools.cache(exported_utils._materialize_cpp_cia_ops)  # the same, there
_fx_passes.decompose_with_registry = lowered.decompose
torch.fx.config.do_not_emit_stack_traces = True  # no graph's file has one

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "export", "engines")
SIZE = (64, 64)
FAMILIES = ("sd", "sdxl")
BATCH = {("sd", "fp32"): 1, ("sdxl", "fp32"): 3, ("sd", "fp16"): 1, ("sdxl", "fp16"): 1}  # of the shared bundles
HALF = ("sd", pytest.param("sdxl", marks=pytest.mark.full))  # families in fp16: SDXL's bundle takes 20 seconds
ON = {"backend": "onnxruntime", "device": "cpu"}  # where a test builds, on every machine, unless it is about another
ON_ARGUMENTS = ("--backend", "onnxruntime", "--device", "cpu")

BundleFactory = Callable[..., Path]

LONGEST_FIRST = (
    "test_parity.py",
    "test_demo.py",
    "test_chains.py",
    "test_openvino.py",
    "test_control.py",
    "test_verify.py",
    "test_bench.py",
    "test_tensorrt.py",
    "test_bad_input.py",
    "test_build.py",
    "test_pipeline.py",
    "test_remedies.py",
    "test_guidance.py",
    "test_tokenizer.py",
    "test_stream.py",
    "test_backends.py",
    "test_tampering.py",
    "test_conformance.py",
    "test_light.py",
    "test_hub_bundles.py",
    "test_outside.py",
    "test_inversion.py",
    "test_parts.py",
    "test_schedulers.py",
    "test_synthetic.py",
    "test_weights.py",
    "test_relatives.py",
    "test_inpainting.py",
    "test_image_to_image.py",
    "test_diffusers_call.py",
    "test_single_file.py",
    "test_schedule.py",
    "test_tensorrt_api.py",
    "test_forks.py",
    "test_vae_encoder.py",
    "test_sampler_steps.py",
    "test_fuse.py",
    "test_first_gpu_run.py",
    "test_trace.py",
    "test_files.py",
)
"""The files that take over eight seconds; the others follow, so that neither process waits long for the other."""


def in_each_precision(cases: Iterable[tuple[str, ...]]) -> list[ParameterSet]:
    """These cases, whose first word is the family, in fp32 and fp16; see `HALF`."""
    return [
        pytest.param(*case, precision, marks=[pytest.mark.full] * ((case[0], precision) == ("sdxl", "fp16")))
        for precision in ("fp32", "fp16")
        for case in cases
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundles", type=Path, metavar="FOLDER", help="keep the shared bundles here for the next session")


CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set()


def pytest_configure() -> None:
    """Give each process of the session cores of its own: the libraries' threads spin, and would take the other's.

    An import or a trace makes very many objects that stay: Python need not look through them every 700.
    """
    gc.set_threshold(100_000, 20, 100)
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if 1 < count <= len(CORES):
        os.sched_setaffinity(0, sorted(CORES)[int(worker.removeprefix("gw")) :: count])


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test that is about several threads."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the libraries' objects, a million, would be looked at again in each collection


@pytest.fixture(scope="session")
def of_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this session see."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shared(of_session: Path, pytestconfig: pytest.Config) -> Iterator[Path]:
    """The folder of the checkpoints and the bundles: the session's, or one that outlives it."""
    root = pytestconfig.getoption("bundles")
    if root is None:
        yield of_session
        return
    folder = kept.folder(root.absolute(), kept.key(ROOT, PACKAGES))
    with locked(folder / "in-use", fcntl.LOCK_SH):
        yield folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While a test marked `alone` runs, the other process waits."""
    alone = item.get_closest_marker("alone") is not None
    lock = Path(item.config.cache.mkdir("turbochain")) / "lock"  # type: ignore[union-attr]
    with locked(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def tokenizers_stay() -> None:
    """Keep every tokenizer that was read: hundreds of pipelines are loaded, each of which would read its own."""
    feeds._TOKENIZERS = {}  # type: ignore[assignment]


@pytest.fixture(scope="session", autouse=True)
def traces_stay(shared: Path) -> None:
    """Say where builds in this process keep what they trace."""
    here.FOLDER[:] = [shared / "traced"]


@pytest.fixture(scope="session")
def checkpoints(shared: Path) -> dict[str, Path]:
    """Family → folder of a miniature checkpoint in diffusers' format. Tests must not change it."""
    folders = {family: shared / f"{family}-turbo-mini" for family in FAMILIES}
    with locked(shared / "lock"):
        for folder in folders.values():
            if not (folder / "LICENSE").exists():  # it is written last
                synthetic.write_checkpoint(folder.name, folder)
    return folders


@pytest.fixture(scope="session")
def bundle_of(checkpoints: dict[str, Path], shared: Path) -> BundleFactory:
    """(family, precision="fp32") → a built bundle of 64×64, `BATCH` pictures per pass, with 1 to 4 steps.

    It has the tasks of a build that is given none. Tests must not change it.
    """

    def make(family: str, precision: str = "fp32") -> Path:
        path, batch = shared / f"{family}-{precision}.bundle", BATCH[family, precision]
        with locked(path.with_suffix(".lock")):  # the other process may be building it
            if not (path / "engines").exists():
                shape = {"precision": precision, "size": SIZE, "batch": batch}
                build_here(str(checkpoints[family]), path, **shape, quiet=True, **ON)
        return path

    return make


@pytest.fixture(scope="session")
def interrupted(checkpoints: dict[str, Path], shared: Path) -> Path:
    """A checkpoint with `x.bundle` in it, whose build was interrupted, and what was said; see `interrupted.build`.

    SDXL, one picture of 72×88 per pass, with 1 to 4 steps. Tests must not change it.
    """
    folder = shared / "interrupted"
    with locked(shared / "interrupted.lock"):
        if not (folder / "x.bundle").exists():
            interruption.write_source(checkpoints["sdxl"], folder)
            interruption.build(folder, *ON_ARGUMENTS)
    return folder


EXPORTED = """
import sys
from turbochain.export import export
print(export("demo", sys.argv[1], steps=(1, 2, 4), tasks=sys.argv[2:], quiet=True))
print(sys.modules["turbochain.export"].__file__)
assert not {"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)
"""


@pytest.fixture(scope="session")
def exported(shared: Path, wheel: Path) -> Path:
    """The demo model's bundle for text-to-image in 1, 2 and 4 steps without an engine, made by an installed wheel.

    The process that asked for it printed nothing of its own, and loaded none of the exporter's libraries. It had no
    network, and `exported-home` as its home. Tests must not change it.
    """
    path, home = shared / "exported" / "demo.bundle", shared / "exported-home"
    with locked(shared / "exported.lock"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(outside.installed(home))
            done = outside.run(sys.executable, "-c", EXPORTED, path, TEXT_TO_IMAGE, home=home, cwd=path.parent)
            own = outside.installed(home) / "turbochain/export/__init__.py"
            assert (done.stdout, done.stderr, done.returncode) == (f"{path}\n{own}\n", "", 0), done
    return path


@pytest.fixture(scope="session")
def demo(exported: Path, shared: Path) -> Path:
    """The demo model's bundle, with an engine. Tests must not change it."""
    path = shared / "demo.bundle"
    with locked(shared / "demo.lock"):
        if not path.exists():
            shutil.copytree(exported, path)
        if not (path / "engines").exists():
            build_here("demo", path, steps=[1, 2, 4], tasks=[TEXT_TO_IMAGE], quiet=True, **ON)
    return path


@pytest.fixture(scope="session")
def sd(bundle_of: BundleFactory) -> Path:
    """The SD miniature, fp32, one picture per pass."""
    return bundle_of("sd")


@pytest.fixture(scope="session")
def sdxl(bundle_of: BundleFactory) -> Path:
    """The SDXL miniature, fp32, three pictures per pass."""
    return bundle_of("sdxl")


@pytest.fixture(scope="session")
def server(sd: Path) -> "Iterator[Serving]":
    """The SD miniature, served with the defaults: 64x64, text-to-image and image-to-image, 1 to 4 steps."""
    from serving import serving  # here, as most sessions of one file serve nothing

    with serving(sd) as found:
        yield found


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two chains written by hand (`small_bundle.py`), verified on the CPU. Tests must not change it."""
    return calls.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def right(small: Path) -> list[np.ndarray]:
    """What the CPU backend makes of `calls.ALL`, one after the other."""
    with calls.on_cpu(small) as pipe:
        return [calls.draw(pipe, call) for call in calls.ALL]


@pytest.fixture(scope="session")
def guided(checkpoints: dict[str, Path], shared: Path) -> Path:
    """The SD miniature with guidance by default and with all tasks, 2 and 4 steps. Tests must not change it."""
    path = shared / "guided.bundle"
    with locked(shared / "guided.lock"):
        if not (path / "engines").exists():
            how = {"tasks": ["text-to-image", "image-to-image", "inpainting"], "guidance_scale": 5.0, "steps": [2, 4]}
            build_here(str(checkpoints["sd"]), path, precision="fp32", size=SIZE, quiet=True, **how, **ON)
    return path


@pytest.fixture(scope="session")
def reference_lora(checkpoints: dict[str, Path], shared: Path) -> Path:
    """A LoRA of the SD miniature's attention, of rank 4, in peft's format."""
    path = shared / "reference-lora.safetensors"
    if not path.exists():
        lora_files.write(path, lora_files.draw(checkpoints["sd"], seed=1, only="attn"), "peft")
    return path


@pytest.fixture(scope="session")
def slotted(checkpoints: dict[str, Path], reference_lora: Path, shared: Path) -> Path:
    """The SD miniature with slots of rank 8, 1 and 2 steps, and a case with `reference_lora` at 0.8. Tests must not
    change it."""
    path = shared / "slotted.bundle"
    with locked(shared / "slotted.lock"):
        if not (path / "engines").exists():
            how = {"tasks": ["text-to-image"], "lora_rank": 8, "steps": [1, 2]}
            how |= {"reference_lora": [f"{reference_lora}:0.8"]}
            build_here(str(checkpoints["sd"]), path, precision="fp32", size=SIZE, quiet=True, **how, **ON)
    return path


@pytest.fixture(scope="session")
def controlled(checkpoints: dict[str, Path], shared: Path) -> Path:
    """The SD miniature with the ControlNet canny and the T2I-Adapter sketch, which lie beside it; 1 and 2 steps.

    Tests must not change it.
    """
    folder = shared / "controlled"
    with locked(shared / "controlled.lock"):
        if not (folder / "made.bundle/engines").exists():
            import control_nets  # it imports diffusers, which few sessions of one file need

            control_nets.build("sd", checkpoints["sd"], folder, steps=[1, 2])
    return folder / "made.bundle"


@pytest.fixture(scope="session")
def guided_server(guided: Path) -> "Iterator[Serving]":
    """The bundle `guided`, served."""
    from serving import serving

    with serving(guided) as found:
        yield found


@pytest.fixture(scope="session")
def two_models(sd: Path, guided: Path) -> "Iterator[Serving]":
    """Two bundles, served together."""
    from serving import serving

    with serving(sd, guided) as found:
        yield found


@pytest.fixture(scope="session")
def wheel(of_session: Path) -> Path:
    """A wheel built from a copy of the sources."""
    folder = of_session / "wheel"
    with locked(of_session / "wheel.lock"):
        if not folder.exists():
            for name in PACKAGES:
                shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, folder / "source")
            line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
            done = subprocess.run(line, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for PyTorch: with more, miniatures lose most of the time to threads that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A bundle → a copy that a test may change."""

    def copy(bundle: Path) -> Path:
        target = tmp_path / bundle.name
        subprocess.run(["cp", "-r", str(bundle), str(target)], check=True)
        return target

    return copy


@pytest.fixture
def opened(sd: Path) -> Bundle:
    """The SD miniature, opened."""
    return Bundle.open(sd)


def reseal(path: Path) -> None:
    """Describe a bundle's files as they now are, its engines with them, so that only `verify` can tell of a change."""
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"] = {name: dataclasses.asdict(hashing.describe(path / name)) for name in manifest["files"]}
    (path / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(path)
    for file in path.glob("engines/*/engine.json"):
        made = json.loads(file.read_text())
        for name, graph in made["graphs"].items():
            graph["digest"] = bundle.graph_digest(name)
        made["verified"] = {name: bundle.open_chain(name).digest for name in made["checks"]}
        file.write_text(json.dumps(made))


def program(name: str) -> Path:
    """Where `turbochain` or `build-engine` is installed."""
    return Path(sys.executable).with_name(name)


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `turbochain` or `build-engine` (the first argument) as a user would; output captured as text."""
    line = [str(program(str(arguments[0]))), *map(str, arguments[1:])]
    return subprocess.run(line, capture_output=True, text=True, **{"timeout": 600, **options})  # type: ignore[call-overload]


def called(program: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Do what `command` does in this process, which saves the seconds that a process needs to start.

    For what is refused before any work, or makes one picture. A backend's own output is not captured.
    """
    entry = {"turbochain": main.main, "build-engine": cli.main}[program]
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = entry(words)
        except SystemExit as exit:  # argparse's
            status = int(exit.code or 0)
    return subprocess.CompletedProcess([program, *words], status, out.getvalue(), err.getvalue())
