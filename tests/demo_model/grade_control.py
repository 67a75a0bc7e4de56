"""Measure the demo model's ControlNet on prompts and places that it was never trained on.

    python tests/demo_model/grade_control.py [--single 50] [--double 100] [-o control.json]

Builds a bundle (fp32) of export/demo with the ControlNet and asks for one picture per prompt, each with a seed of its
own and the edges of a drawn picture: of diffusers in fp32, of the bundle, and of the bundle without the edges.
`score.faults` and `score.misplaced` say of each what is wrong.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import score
from control import CONTROL, HIGH, LOW
from grade import ours, summary, theirs
from numpy.typing import NDArray
from tqdm import tqdm

from turbochain.runtime.inputs import canny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import machine


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=50, help="prompts with one object")
    parser.add_argument("--double", type=int, default=100, help="prompts with two")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("control.json"))
    arguments = parser.parse_args()
    asked, run = scenes.held_out(arguments.single, arguments.double), machine.run()
    found = {
        "date": run.date,
        "commit": run.commit,
        "machine": asdict(run.machine),
        "versions": run.versions,
        "training": json.loads((CONTROL / "training.json").read_text()),
        "pixels that a centre may be away": score.NEAR,
    }
    with tempfile.TemporaryDirectory() as folder:
        found["1 step"] = compare(asked, Path(folder))
    arguments.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(found["1 step"], indent=2, ensure_ascii=False))


def compare(asked: list[scenes.Scene], folder: Path) -> dict[str, Any]:
    """Scores with and without control, and how far the bundle is from diffusers."""
    how = {"tasks": ["text-to-image"], "steps": [1], "controlnet": {"canny": str(CONTROL)}}
    reference, bundle = theirs(), ours("fp32", folder, **how)
    names = ("diffusers fp32", "fp32 bundle", "fp32 bundle without control")
    shown: dict[str, list[list[str]]] = {name: [] for name in names}
    placed: dict[str, list[list[str]]] = {name: [] for name in names}
    differ = []
    for seed, scene in enumerate(tqdm(asked, mininterval=5)):
        centres, edges = where(scene, seed)
        theirs_, ours_ = reference(str(scene), seed, 1, edges=edges), bundle(str(scene), seed, 1, control_image=edges)
        for name, picture in zip(names, (theirs_, ours_, bundle(str(scene), seed, 1)), strict=True):
            faults = score.faults(picture, scene)
            shown[name].append(faults)
            placed[name].append(faults + score.misplaced(picture, scene, centres))
        differ.append(np.abs(theirs_.astype(int) - ours_))
    return {
        "right": {name: summary(asked, of) for name, of in shown.items()},
        "right and in place": {name: summary(asked, of) for name, of in placed.items()},
        "fp32 bundle against diffusers": {
            "max_abs": int(max(d.max() for d in differ)),
            "largest fraction_differing": float(max((d > 0).mean() for d in differ)),
        },
    }


def where(scene: scenes.Scene, seed: int) -> tuple[list[tuple[float, float]], NDArray[np.uint8]]:
    """Draw places for a scene, which the noise of this seed does not choose.

    Return the objects' centres (x, y) in pixels, and the edges of the picture with the objects there, (512, 512).
    """
    placed = np.random.default_rng(seed).standard_normal(2).astype(np.float32)
    return scenes.centres(scene, placed), canny(scenes.draw(scene, placed), LOW, HIGH)


if __name__ == "__main__":
    main()
