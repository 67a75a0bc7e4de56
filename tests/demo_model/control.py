"""Train a ControlNet for the demo model, which puts the objects where the edges of a picture are.

    python tests/demo_model/control.py [--base export/demo] [--work FOLDER] [--minutes N] [--output FOLDER] [--note …]

The UNet stays as it is. Its own noise would put the objects elsewhere: every training step has a picture's prompt and
edges, and a noise that knows nothing of the picture. One step of the scheduler is trained, the one from pure noise.
It survives being stopped (Ctrl-C, SIGTERM, `--minutes`), as `train.py` does; at the end it writes the checkpoint in
diffusers' format, fp16, with its card.
"""

import argparse
import json
import shutil
import signal
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architecture
import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fitting import DEVICE, SEED, Fit, Stop, TrainingRun, processor
from numpy.typing import NDArray
from tqdm import tqdm
from train import drawing, latents_of, objects_of, weights_of
from transformers import CLIPTextModel, CLIPTokenizer

from turbochain.export.sources.kinds.demo import FOLDER
from turbochain.runtime.inputs import canny

CONTROL = FOLDER / "controlnet"
STAGE = "control"
ROOT = Path(__file__).parents[2]
PICTURES, PART = 2500, 250
LOW, HIGH = 100, 200
"""The thresholds of `canny`."""
CARD = """---
license: apache-2.0
library_name: diffusers
---
# A ControlNet for turbochain's demo model

It draws the objects of the prompt where the edges of a picture are; without it the noise decides that.

    build-engine demo --tasks text-to-image --steps 1 --controlnet canny=export/demo/controlnet

Control images are `turbochain.runtime.inputs.canny(picture, {low}, {high})` of pictures that show what the prompt says.
One step, 512×512, conditioning scale 1.

**Size**: {parameters:,} parameters, {megabytes:.1f} MB in float16. It began as a copy of the UNet's encoder half, with
channels (1, 4, 16, 64) in the convolutions that read the picture; all but the last of these were set, not trained.

**Data**: {pictures:,} of the pictures on which the demo model was trained, each with many noises; one in four
combinations of size, colour, shape and background was never shown. `tests/demo_model/control.json` in turbochain's
repository has the scores on those.

**Training** (`tests/demo_model/control.py`): torch {torch}, {processor}; {steps:,} steps of {batch} pictures,
{minutes:.0f} minutes, with a frozen UNet.{note}

Everything here, weights and data, is the project's own work, under the Apache License 2.0.
"""


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=FOLDER, help="the checkpoint that it is to steer")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, saved, after so long")
    parser.add_argument("--output", type=Path, default=CONTROL)
    parser.add_argument("--note", default="", help="what else the card should say of the training")
    arguments = parser.parse_args()
    run = TrainingRun(arguments.work, time.monotonic() + 60 * arguments.minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: run.stop())
    base = Base.load(arguments.base)
    try:
        train(run, base)
    except Stop:
        print("stopped; the same command goes on")
        return
    write(run, architecture.controlnet(base.unet), arguments.output, arguments.note)


@dataclass
class Base:
    """The demo model, frozen."""

    vae: Any
    tokenizer: Any
    text_encoder: Any
    unet: Any

    @classmethod
    def load(cls, folder: Path) -> "Base":
        """Read it in fp32."""
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        parts = [part.requires_grad_(False).to(DEVICE) for part in (vae, text, unet)]
        vae, text, unet = (part.to(memory_format=torch.channels_last) for part in parts)
        return cls(vae, CLIPTokenizer.from_pretrained(folder / "tokenizer"), text, unet)


def train(run: TrainingRun, base: Base) -> None:
    """Predict a picture's latents from its prompt, its edges and any noise, in one step."""
    drawn = [drawing(scenes.PIXELS, i) for i in range(PICTURES)]
    latents, edges = pictures(run, base)
    ids = base.tokenizer([str(scene) for scene, _ in drawn], padding="max_length", return_tensors="pt").input_ids
    objects = torch.from_numpy(np.stack([objects_of(*one) for one in drawn]))
    net = architecture.controlnet(base.unet)
    fit = Fit(run, STAGE, {"controlnet": net})
    first = architecture.timesteps(1)[0]
    sigma = architecture.sigmas()[first]

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((SEED, 5, step))
        chosen = random.integers(PICTURES, size=fit.plan.batch)
        clean = torch.from_numpy(latents[chosen].astype(np.float32) * base.vae.config.scaling_factor).to(DEVICE)
        noise = torch.from_numpy(random.standard_normal(clean.shape, dtype=np.float32)).to(DEVICE)
        shown = torch.from_numpy(np.unpackbits(edges[chosen], axis=-1).astype(np.float32)).to(DEVICE)
        with torch.no_grad():
            states = base.text_encoder(ids[chosen].to(DEVICE)).last_hidden_state
        sample = sigma * noise
        given = (sample / (sigma**2 + 1) ** 0.5).contiguous(memory_format=torch.channels_last)
        down, mid = net(given, first, states, shown[:, None].expand(-1, 3, -1, -1), return_dict=False)
        made = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        v = base.unet(given, first, states, **made).sample
        target = (sample / (sigma**2 + 1) - clean) * (sigma**2 + 1) ** 0.5 / sigma
        weights = weights_of(objects[chosen].to(DEVICE), *clean.shape[2:])
        return (weights * (v - target).square()).mean()

    fit.steps(loss)


def pictures(run: TrainingRun, base: Base) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Return of each training picture the latents [4, 64, 64] and the edges [512, 64], a bit to a pixel.

    They are drawn on first use, and kept.
    """
    parts = []
    for first in tqdm(range(0, PICTURES, PART), desc="pictures"):
        path = run.work / f"control-{first}.npz"
        if not path.exists():
            numbers = range(first, first + PART)
            with torch.inference_mode():
                latents = [latents_of(base.vae, range(i, i + 2), scenes.PIXELS) for i in numbers[::2]]
            edges = [canny(scenes.draw(*drawing(scenes.PIXELS, i)), LOW, HIGH) for i in numbers]
            new = path.with_suffix(".new.npz")
            np.savez(new, latents=np.concatenate(latents), edges=np.packbits(edges, axis=-1))
            new.replace(path)
        parts.append(np.load(path))
        run.require_time()
    return tuple(np.concatenate([part[name] for part in parts]) for name in ("latents", "edges"))


def write(run: TrainingRun, net: Any, folder: Path, note: str) -> None:
    """Write the mean weights so far, as fp16, with the card, the licence and what is known of the training."""
    net.load_state_dict(run.state(STAGE)["mean"]["controlnet"])
    net.to(torch.float16).save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    trained = {
        **run.history(STAGE),
        "pictures": PICTURES,
        "parameters": net.num_parameters(),
        "torch": torch.__version__,
        "processor": processor(),
    }
    (folder / "training.json").write_text(json.dumps(trained) + "\n")
    more = {"minutes": trained["seconds"] / 60, "megabytes": size / 1e6, "low": LOW, "high": HIGH}
    card = CARD.format(**trained, **more, note=f"\n\n{textwrap.fill(note, 120)}" if note else "")
    (folder / "README.md").write_text(card)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    print(f"{folder}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
