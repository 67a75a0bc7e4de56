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
from turbochain.runtime import Pipeline
from turbochain.runtime.errors import TurbochainError

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]

CALLS = 3  # of each combination
REFUSED = (
    r"the unet \(\d+ such in all\), which diffusers leaves out",  # it says nothing, and draws another picture
    r"makes NaN or infinity of its latents",  # from noise alone; it draws what begins at a later timestep
)
"""What is refused though diffusers draws it, and only that."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
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
    print(f"\n{seed}: {made}, {backend}")
    calls = [combinations.call(rng, made) for _ in range(CALLS)]
    try:
        build_here(made.source, tmp_path / "x.bundle", backend=backend, options=options, **made.options)
    except TurbochainError as error:
        task, _, diffused = calls[0]
        assert_rightly_refused(error, lambda: image_calls.theirs(made.pipelines()[task], diffused))
        return
    theirs = made.pipelines()
    with Pipeline.load(tmp_path / "x.bundle") as pipe:
        for task, ours, diffused in calls:
            print(task, combinations.told(ours))
            compare(pipe, theirs[task], ours, diffused)


def compare(pipe: Pipeline, theirs: Any, ours: Options, diffused: Options) -> None:
    """Draw a call with both."""
    try:
        pictures = pipe(**ours, output_type="uint8").images
    except TurbochainError as error:
        assert_rightly_refused(error, lambda: image_calls.theirs(theirs, diffused))
        return
    assert isinstance(pictures, np.ndarray)
    apart = image_calls.Apart()
    apart.add(pictures, image_calls.theirs(theirs, diffused))
    print(f"  {apart!r}")


def assert_rightly_refused(error: TurbochainError, theirs: Callable[[], np.ndarray]) -> None:
    """Diffusers draws no picture either, or it is known why we do not."""
    print("  refused:", error)
    try:
        images = theirs()
    except Exception as other:  # diffusers has no errors of its own
        print(f"  diffusers: {type(other).__name__}: {other}")
        return
    print("  diffusers draws", images.shape)
    assert images.min() == images.max() or any(re.search(known, str(error)) for known in REFUSED), str(error)
