"""Measure what int8 changes in the demo model's pictures, on prompts that it was never trained on.

    python tests/demo_model/grade_int8.py [--single 150] [--double 350] [--bundle BUNDLE] [-o int8.json]

Builds a bundle of export/demo with an engine in fp32 and one in int8 (OpenVINO, `-O int8=all`), and asks both for one
picture per prompt, each with a seed of its own. `score` says of each picture which objects it shows.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import score
from numpy.typing import NDArray
from scenes import Scene
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from turbochain.engines import BuildResult, build
from turbochain.export.sources.kinds.demo import FOLDER, NAME
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Engine

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import machine

OPTIONS = {"inference_precision": "fp32"}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=150, help="prompts with one object")
    parser.add_argument("--double", type=int, default=350, help="prompts with two")
    parser.add_argument("--bundle", type=Path, help="where the bundle is, or is built (default: nowhere for long)")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("int8.json"))
    arguments = parser.parse_args()
    asked, run = scenes.held_out(arguments.single, arguments.double), machine.run()
    found: dict[str, Any] = {
        "date": run.date,
        "commit": run.commit,
        "machine": asdict(run.machine),
        "versions": run.versions,
        "training": json.loads((FOLDER / "training.json").read_text()),
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or Path(folder) / "demo.bundle"
        source = str(bundle) if bundle.exists() else NAME
        how: dict[str, Any] = {"backend": "openvino", "quiet": True}
        how |= {} if bundle.exists() else {"tasks": [TEXT_TO_IMAGE], "steps": [1, 2, 4]}
        made = [build(source, bundle, options={**OPTIONS, "int8": int8}, **how) for int8 in ("none", "all")]
        found |= settled(bundle, made[1])
        exact, int8 = (Pipeline.load(bundle, engine=of.engine) for of in made)
        found["1 step"] = compare(exact, int8, asked)
    arguments.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(found["1 step"], indent=2, ensure_ascii=False))


def settled(bundle: Path, made: BuildResult) -> dict[str, Any]:
    """What a build in int8 has settled: its options, layers in int8 and of how many, the checks of the picture."""
    engine = Bundle.open(bundle).engines()[made.engine]
    assert isinstance(engine, Engine)
    image = {check.metric: check.value for check in made.checks[TEXT_TO_IMAGE] if check.stage == "image"}
    return {"options": engine.options, "layers in int8": made.int8, "recorded pictures against diffusers": image}


def compare(exact: Pipeline, int8: Pipeline, asked: Sequence[Scene]) -> dict[str, Any]:
    """What both show of every scene, and how far the pictures are apart: (512, 512, 3) uint8."""
    different, right, psnr, ssim = [], np.zeros(2, int), [], []
    for seed, scene in enumerate(bar := tqdm(asked, mininterval=5)):
        pair = [
            pipe(str(scene), seed=seed, num_inference_steps=1, output_type="uint8").images[0] for pipe in (exact, int8)
        ]
        right += [not score.faults(picture, scene) for picture in pair]
        if objects(pair[0], scene) != objects(pair[1], scene):
            different.append(str(scene))
        psnr.append(float(peak_signal_noise_ratio(*pair, data_range=255)))
        ssim.append(float(structural_similarity(*pair, channel_axis=2, data_range=255)))
        bar.set_postfix(refresh=False, psnr=min(psnr), ssim=min(ssim), others=len(different))
    return {
        "pictures": len(asked),
        "with the same objects": len(asked) - len(different),
        "with others": different,
        "without a fault": {"fp32": int(right[0]), "int8": int(right[1])},
        "psnr_db": {"lowest": round(min(psnr), 2), "median": round(float(np.median(psnr)), 2)},
        "furthest": {str(asked[i]): round(psnr[i], 2) for i in np.argsort(psnr)[:5]},
        "ssim": {"lowest": round(min(ssim), 4), "median": round(float(np.median(ssim)), 4)},
    }


def objects(picture: NDArray[np.uint8], scene: Scene) -> list[tuple[str, ...]]:
    """Size and shape of what has the colour of each thing in a picture (512, 512, 3)."""
    colours = score.nearest(picture)
    masks = [score.largest(colours == thing.colour) for thing in scene.things]
    return [score.looks_like(mask)[1:] if mask.any() else () for mask in masks]


if __name__ == "__main__":
    main()
