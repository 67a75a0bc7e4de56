import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from here import build_here
from kept import locked
from serving import Serving, serving


@pytest.fixture(scope="session")
def server(sd: Path) -> Iterator[Serving]:
    """The SD miniature, served with the defaults: 64x64, text-to-image and image-to-image, 1 to 4 steps."""
    with serving(sd) as found:
        yield found


@pytest.fixture(scope="session")
def guided(checkpoints: dict[str, Path], shared: Path) -> Path:
    """The SD miniature with guidance by default and with all tasks, 2 and 4 steps. Tests must not change it."""
    path = shared / "guided.bundle"
    with locked(shared / "guided.lock", fcntl.LOCK_EX):
        if not (path / "engines").exists():
            how = {"tasks": ["text-to-image", "image-to-image", "inpainting"], "guidance_scale": 5.0, "steps": [2, 4]}
            on = {"backend": "onnxruntime", "device": "cpu", "quiet": True}
            build_here(str(checkpoints["sd"]), path, precision="fp32", size=(64, 64), **how, **on)
    return path


@pytest.fixture(scope="session")
def guided_server(guided: Path) -> Iterator[Serving]:
    """The bundle `guided`, served."""
    with serving(guided) as found:
        yield found
