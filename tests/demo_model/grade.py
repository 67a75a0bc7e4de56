"""Measure the demo model on prompts that show combinations it was never trained on.

    python tests/demo_model/grade.py [--single 150] [--double 350] [--steps 1 2 3 4] [-o metrics.json]

Builds bundles of export/demo (fp32 and fp16) and asks for one picture per prompt, each with a seed of its own, of
diffusers in fp32 and of both bundles. `score.faults` says of each whether it shows what the prompt says.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import score
import torch
from control import CONTROL
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from turbochain.engines import build
from turbochain.export.sources.kinds.demo import FOLDER, NAME
from turbochain.runtime import Pipeline

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import machine

KINDS = {
    "no clear": "unclear shape",
    "is not": "relation",
    "nothing": "missing",
    "%": "stray",
    "pixels away": "misplaced",
}
"""What is in a sentence of `score` → the kind of fault; others are "other shape or size"."""
Pictures = NDArray[np.uint8]  # (512, 512, 3)
Draw = Callable[..., Pictures]
"""(prompt, seed, steps) → a picture; further arguments are diffusers'."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--single", type=int, default=150, help="prompts with one object")
    parser.add_argument("--double", type=int, default=350, help="prompts with two")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4], help="of every fifth prompt, but for 1")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("metrics.json"))
    arguments = parser.parse_args()
    asked = scenes.held_out(arguments.single, arguments.double)
    run = machine.run()
    found: dict[str, Any] = {
        "date": run.date,
        "commit": run.commit,
        "machine": asdict(run.machine),
        "versions": run.versions,
    }
    found["training"] = json.loads((FOLDER / "training.json").read_text())
    found["vae_psnr_db"] = vae_psnr(asked[::5])
    with tempfile.TemporaryDirectory() as folder:
        for steps in arguments.steps:
            found[f"{steps} steps" if steps > 1 else "1 step"] = compare(
                asked[:: 1 if steps == 1 else 5], steps, Path(folder)
            )
            arguments.output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(found, indent=2, ensure_ascii=False))


def theirs() -> Draw:
    """diffusers' own pipelines, in fp32: for image-to-image if an `image` is given, ControlNet's if edges are."""
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    net = ControlNetModel.from_pretrained(CONTROL, torch_dtype=torch.float32)
    given = {**pipe.components, "requires_safety_checker": False}
    from_image = StableDiffusionImg2ImgPipeline(**given)
    steered = StableDiffusionControlNetPipeline(**given, controlnet=net)
    for each in (pipe, from_image, steered):
        each.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int, steps: int, edges: Any = None, **more: Any) -> Pictures:
        generator, kind = torch.Generator("cpu").manual_seed(seed), from_image if "image" in more else pipe
        if edges is not None:
            kind, more["image"] = steered, Image.fromarray(edges).convert("RGB")
        result = kind(prompt, num_inference_steps=steps, guidance_scale=0.0, generator=generator, **more)
        return np.asarray(result.images[0])

    return draw


def ours(precision: str, folder: Path, **how: Any) -> Draw:
    """A bundle of the demo model, built into `folder` once; `how`: further arguments of the build."""
    bundle = folder / f"{precision}.bundle"
    if not bundle.exists():
        build(NAME, bundle, precision=precision, backend="onnxruntime", device="cpu", quiet=True, **how)
    pipe = Pipeline.load(bundle)

    def draw(prompt: str, seed: int, steps: int, **more: Any) -> Pictures:
        return pipe(prompt, seed=seed, num_inference_steps=steps, output_type="uint8", **more).images[0]

    return draw


def compare(asked: list[scenes.Scene], steps: int, folder: Path) -> dict[str, Any]:
    """Scores of diffusers and of both bundles, and how far these are from diffusers."""
    draws = {"diffusers fp32": theirs(), "fp32 bundle": ours("fp32", folder), "fp16 bundle": ours("fp16", folder)}
    faults: dict[str, list[list[str]]] = {name: [] for name in draws}
    differ, psnr = [], []
    for seed, scene in enumerate(tqdm(asked, desc=f"{steps} steps", mininterval=5)):
        pictures = {name: draw(str(scene), seed, steps) for name, draw in draws.items()}
        for name, picture in pictures.items():
            faults[name].append(score.faults(picture, scene))
        reference, single, half = pictures.values()
        differ.append(np.abs(reference.astype(int) - single))
        psnr.append(peak_signal_noise_ratio(reference, half, data_range=255))
    return {
        **{name: summary(asked, of) for name, of in faults.items()},
        "fp32 bundle against diffusers": {
            "max_abs": int(max(d.max() for d in differ)),
            "largest fraction_differing": float(max((d > 0).mean() for d in differ)),
        },
        "fp16 bundle against diffusers": {"lowest psnr_db": round(float(min(psnr)), 2)},
    }


def summary(asked: list[scenes.Scene], faults: list[list[str]]) -> dict[str, Any]:
    """The share of prompts without a fault, by number of objects, and some of the faults."""
    right: dict[str, list[bool]] = {"one object": [], "two objects": []}
    for scene, of in zip(asked, faults, strict=True):
        right["two objects" if scene.relation else "one object"].append(not of)
    wrong = [f"{scene}: {'; '.join(of)}" for scene, of in zip(asked, faults, strict=True) if of]
    kinds = Counter(_kind(fault) for of in faults for fault in of)
    return {
        **{name: {"prompts": len(of), "right": sum(of)} for name, of in right.items() if of},
        "kinds of fault": dict(kinds.most_common()),
        "faults": wrong[:20],
    }


def _kind(fault: str) -> str:
    for part, kind in KINDS.items():
        if part in fault:
            return kind
    return "other shape or size"


@torch.inference_mode()
def vae_psnr(asked: list[scenes.Scene]) -> dict[str, float]:
    """PSNR in dB of drawn pictures after encoder and decoder in fp32: the lowest, and the mean."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    found = []
    for seed, scene in enumerate(asked):
        drawn = scenes.draw(scene, np.random.default_rng(seed).standard_normal(2))
        given = torch.from_numpy(drawn.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        again = vae.decode(vae.encode(given).latent_dist.mean).sample[0].permute(1, 2, 0).numpy()
        again = np.rint((again.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        found.append(peak_signal_noise_ratio(drawn, again, data_range=255))
    return {"lowest": round(float(min(found)), 2), "mean": round(float(np.mean(found)), 2)}


if __name__ == "__main__":
    main()
