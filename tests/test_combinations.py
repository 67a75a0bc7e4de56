"""What nobody thought of: random combinations (`combinations.py`) against diffusers' own pipelines.

`make check-full` tries a few; `make campaign COMBINATIONS=100:140` tries those of other seeds.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import combinations
import image_calls
import numpy as np
import pytest
from combinations import Options
from here import build_here

from turbochain.export.sources import synthetic
from turbochain.runtime import InputError, Pipeline
from turbochain.runtime.errors import TurbochainError

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]

CALLS = 3  # of each combination
NO_SUCH_BUILD: tuple[str, ...] = ()
NO_SUCH_CALL = (r"strength=.* makes no step",)
"""What may be refused, and only that."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, last = map(int, metafunc.config.getoption("--combinations").split(":"))
    metafunc.parametrize("seed", range(first, last))


@pytest.fixture(scope="module")
def written(shared: Path) -> Callable[[str], Path]:
    """Preset → its checkpoint, written once."""

    def write(name: str) -> Path:
        folder = shared / "presets" / name
        if not (folder / "LICENSE").exists():  # it is written last
            synthetic.write_checkpoint(name, folder)
        return folder

    return write


def test_a_combination_is_what_diffusers_makes_of_it(seed: int, written: Callable[[str], Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    made = combinations.draw(rng, written, tmp_path)
    backend = rng.choice(["onnxruntime", "openvino"])
    options = {"inference_precision": "fp32"} if backend == "openvino" else {}
    print(f"{seed}: {made}, {backend}")
    try:
        build_here(made.source, tmp_path / "x.bundle", backend=backend, options=options, **made.options)
    except InputError as error:
        print("refused:", error)
        task, _, diffused = combinations.call(rng, made)
        print("diffusers:", tried(made.pipelines()[task], diffused))
        assert any(re.search(known, str(error)) for known in NO_SUCH_BUILD), str(error)
        return
    theirs = made.pipelines()
    with Pipeline.load(tmp_path / "x.bundle") as pipe:
        calls = [combinations.call(rng, made) for _ in range(CALLS)]
        apart = [compared(pipe, theirs[task], ours, diffused) for task, ours, diffused in calls]
    print("pictures:", *filter(None, apart))


def compared(pipe: Pipeline, theirs: Any, ours: Options, diffused: Options) -> str:
    """Compare a call; return how far its pictures are apart, "" if it is refused."""
    print(combinations.told(ours))
    try:
        pictures = pipe(**ours, output_type="uint8").images
    except TurbochainError as error:
        print("refused:", error)
        print("diffusers:", tried(theirs, diffused))
        assert any(re.search(known, str(error)) for known in NO_SUCH_CALL), str(error)
        return ""
    assert isinstance(pictures, np.ndarray)
    apart = image_calls.Apart()
    apart.add(pictures, image_calls.theirs(theirs, diffused))
    return repr(apart)


def tried(theirs: Any, diffused: Options) -> str:
    """Return what comes of a call to diffusers that we refuse."""
    try:
        return f"draws {image_calls.theirs(theirs, diffused).shape}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
