"""The trained demo model in int8: a person sees the same objects as in fp32, and hardly a difference."""

import json
import shutil
from pathlib import Path

import grade_int8
import pytest
import scenes
from here import build_here

from turbochain.export.sources.kinds.demo import FOLDER
from turbochain.runtime import Pipeline

FEW = scenes.held_out(4, 8, seed=7)
MEASURED = Path(grade_int8.__file__).with_name("int8.json")


@pytest.mark.full
def test_the_defaults_stay_in_the_bounds_and_show_the_same_objects(demo: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "int8.bundle"
    shutil.copytree(demo, bundle)
    how = {"backend": "openvino", "quiet": True}
    made = [build_here(str(bundle), options={**grade_int8.OPTIONS, "int8": int8}, **how) for int8 in ("none", "all")]
    assert {made[1].precision[graph] for graph in ("unet", "vae_decoder")} == {"int8"}
    with Pipeline.load(bundle, engine=made[0].engine) as exact, Pipeline.load(bundle, engine=made[1].engine) as int8:
        found = grade_int8.compare(exact, int8, FEW)
    assert found["with the same objects"] == found["pictures"] == len(FEW)
    assert found["psnr_db"]["lowest"] >= 30 and found["ssim"]["lowest"] >= 0.9


def test_the_measured_pictures_show_the_same_objects() -> None:
    """int8.json is what `grade_int8.py` found; the weights have been the same since."""
    measured = json.loads(MEASURED.read_text())
    found = measured["1 step"]
    assert found["pictures"] == found["with the same objects"] == 500
    assert found["psnr_db"]["lowest"] >= 30 and found["ssim"]["lowest"] >= 0.9
    assert all(kept for kept, _ in measured["layers in int8"].values())
    assert measured["training"] == json.loads((FOLDER / "training.json").read_text())
