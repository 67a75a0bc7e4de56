"""Miniature checkpoints of the true architecture, and bundles built from them once per session."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from turbochain.engines import build
from turbochain.export import synthetic
from turbochain.runtime import Bundle

SIZE = (64, 64)
FAMILIES = ("sd", "sdxl")

BundleFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder of a miniature checkpoint in diffusers' format. Tests must not change it."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {family: root / f"{family}-turbo-mini" for family in FAMILIES}
    for folder in folders.values():
        synthetic.write_checkpoint(folder.name, folder)
    return folders


@pytest.fixture(scope="session")
def bundle_of(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> BundleFactory:
    """(family, batch=1, precision="fp32") → a built bundle of 64×64 with 1 to 4 steps. Tests must not change it."""
    root = tmp_path_factory.mktemp("bundles")

    def make(family: str, batch: int = 1, precision: str = "fp32") -> Path:
        path = root / f"{family}-{batch}-{precision}.bundle"
        if not path.exists():
            build(str(checkpoints[family]), path, precision=precision, size=SIZE, batch=batch, quiet=True)
        return path

    return make


@pytest.fixture(scope="session")
def sd(bundle_of: BundleFactory) -> Path:
    """The SD miniature, fp32, one picture per pass."""
    return bundle_of("sd")


@pytest.fixture(scope="session")
def sdxl(bundle_of: BundleFactory) -> Path:
    """The SDXL miniature, fp32, three pictures per pass."""
    return bundle_of("sdxl", batch=3)


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
