"""Miniature checkpoints of the true architecture, and bundles built from them once per session.

The session runs in two processes (`make test`), which share the checkpoints and the bundles.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a thread for each process is what two cores have

import contextlib
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from turbochain.engines import build
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "export", "engines")
SIZE = (64, 64)
FAMILIES = ("sd", "sdxl")
ON = {"backend": "onnxruntime", "device": "cpu"}  # where a test builds, on every machine, unless it is about another
ON_ARGUMENTS = ("--backend", "onnxruntime", "--device", "cpu")

BundleFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this session see."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While a test marked `alone` runs, the other process waits."""
    alone = item.get_closest_marker("alone") is not None
    lock = Path(item.config.cache.mkdir("turbochain")) / "lock"  # type: ignore[union-attr]
    with locked(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        return (yield)


@pytest.fixture(scope="session")
def checkpoints(shared: Path) -> dict[str, Path]:
    """Family → folder of a miniature checkpoint in diffusers' format. Tests must not change it."""
    folders = {family: shared / f"{family}-turbo-mini" for family in FAMILIES}
    with locked(shared / "lock"):
        for folder in folders.values():
            if not folder.exists():
                synthetic.write_checkpoint(folder.name, folder)
    return folders


@pytest.fixture(scope="session")
def bundle_of(checkpoints: dict[str, Path], shared: Path) -> BundleFactory:
    """(family, batch=1, precision="fp32") → a built bundle of 64×64 with 1 to 4 steps. Tests must not change it."""
    root = shared / "bundles"
    root.mkdir(exist_ok=True)

    def make(family: str, batch: int = 1, precision: str = "fp32") -> Path:
        path = root / f"{family}-{batch}-{precision}.bundle"
        with locked(root / f"{path.name}.lock"):  # the other process may be building it
            if not (path / "engines").exists():
                build(str(checkpoints[family]), path, precision=precision, size=SIZE, batch=batch, quiet=True, **ON)
        return path

    return make


@pytest.fixture(scope="session")
def demo(shared: Path) -> Path:
    """The demo model's bundle, built by the command from the source's name. Tests must not change it."""
    path = shared / "demo.bundle"
    with locked(shared / "demo.lock"):
        if not (path / "engines").exists():
            done = command("build-engine", "demo", "-o", path, *ON_ARGUMENTS)
            assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def sd(bundle_of: BundleFactory) -> Path:
    """The SD miniature, fp32, one picture per pass."""
    return bundle_of("sd")


@pytest.fixture(scope="session")
def sdxl(bundle_of: BundleFactory) -> Path:
    """The SDXL miniature, fp32, three pictures per pass."""
    return bundle_of("sdxl", batch=3)


@pytest.fixture(scope="session")
def wheel(shared: Path) -> Path:
    """A wheel built from a copy of the sources."""
    folder = shared / "wheel"
    with locked(shared / "wheel.lock"):
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


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `turbochain` or `build-engine` (the first argument) as a user would; output captured as text."""
    script = Path(sys.executable).with_name(str(arguments[0]))
    line = [str(script), *map(str, arguments[1:])]
    return subprocess.run(line, capture_output=True, text=True, **{"timeout": 600, **options})  # type: ignore[call-overload]
