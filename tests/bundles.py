"""Miniature checkpoints of the true architecture, and bundles built from them once per session.

The session runs in two processes (`make test`), which share the checkpoints and the bundles. With `--bundles FOLDER`
they are also kept for the next session, in a folder named after all that they depend on (`kept.py`).
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calls
import here
import interrupted as interruption
import kept
import lora_files
import lowered
import numpy as np
import outside
import pytest
import small_bundle
import small_calls
import torch
import torch.fx.config
from conftest import BATCH, FAMILIES, ON, ON_ARGUMENTS, PACKAGES, ROOT, SIZE, BundleFactory
from here import build_here, phases_here
from kept import locked
from launches import Ran
from torch._export import utils as exported_utils
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from turbochain.export import export
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.inputs import feeds

if TYPE_CHECKING:
    from serving import Serving

# Each export lists the exporter's 700 functions anew, which takes as long as the smallest graphs.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
exported_utils._materialize_cpp_cia_ops = functools.cache(exported_utils._materialize_cpp_cia_ops)  # the same, there
_fx_passes.decompose_with_registry = lowered.decompose
torch.fx.config.do_not_emit_stack_traces = True  # no graph's file has one
os.fsync = lambda descriptor: None  # no test is about a machine that loses its power; all would wait for the disk


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
def interrupted(checkpoints: dict[str, Path], shared: Path, wheel: Path) -> Path:
    """A checkpoint with `x.bundle` in it, whose build was interrupted, and what was said; see `interrupted.build`.

    SD, three pictures of 72×88 per pass, with 1 to 4 steps. An installed wheel built it, with no network, and
    `interrupted-home` as its home. Tests must not change it.
    """
    folder, home = shared / "interrupted", shared / "interrupted-home"
    with locked(shared / "interrupted.lock"):
        if not (folder / "x.bundle").exists():
            interruption.write_source(checkpoints["sd"], folder)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(outside.installed(home))
            interruption.build(folder, home, *ON_ARGUMENTS)
    return folder


@pytest.fixture(scope="session")
def exported(shared: Path) -> Path:
    """The demo model's bundle for text-to-image in 1, 2 and 4 steps without an engine. Tests must not change it."""
    path = shared / "exported" / "demo.bundle"
    with locked(shared / "exported.lock"):
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with phases_here():
                assert export("demo", path, steps=(1, 2, 4), tasks=[TEXT_TO_IMAGE], quiet=True) == path
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


@pytest.fixture(scope="module")
def one(sd: Path) -> Iterator[Pipeline]:
    """A pipeline of one picture per pass."""
    with Pipeline.load(sd) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def three(sdxl: Path) -> Iterator[Pipeline]:
    """A pipeline of three pictures per pass."""
    with Pipeline.load(sdxl) as pipe:
        yield pipe


@pytest.fixture
def ran(one: Pipeline) -> Ran:
    """Counts the launches of the calls of `one` that it observes; its caches are empty."""
    one.forget()
    return Ran()


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
def two_chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an engine of each CPU backend, which nobody has verified. Tests must not change it."""
    return small_bundle.write(tmp_path_factory.mktemp("two") / "small.bundle", small_calls.cases())


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


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    """A chromium.Page, whose files are saved in `downloads`."""
    from chromium import chromium  # the environment of Ray's tests lacks what it imports

    with chromium(downloads) as page:
        page.view(1200, 900)
        yield page
