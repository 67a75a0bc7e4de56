"""Write what `train.py` has trained so far as a checkpoint in diffusers' format, fp16, with its card.

    python tests/demo_model/checkpoint.py [--work FOLDER] [--output export/demo] [--note TEXT]

Also draws the loss of every stage into loss.png, beside this file.
"""

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import architecture
import matplotlib
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from fitting import TrainingRun, processor
from train import PICTURES, scale

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("vae", "text_encoder", "unet")
LIMIT = 8_000_000  # bytes of their weights
STAGES = ("vae", "text", "small", "generator", "refine")
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# turbochain's demo model

A small one-step text-to-image model of SD-Turbo's architecture, trained for turbochain's demo and its tests, where a
person and a program can both see whether a picture shows what the prompt says. It draws coloured shapes:

    a large red circle left of a small blue square on a yellow background

One or two objects (circle, square, triangle, star; small, large or neither; red, orange, yellow, green, blue, purple,
white, black), a relation (left of, right of, above, below) and a plain background; no two of the same colour. It knows
no other word. 512×512, 1 to 4 steps, `guidance_scale=0.0`. The weights are float16: load with an explicit type, as in
`StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)`.

**Parts**: {sizes} parameters. EulerDiscreteScheduler, trailing,
v-prediction. The first level of the UNet has no attention, as in SDXL. The tokenizer is CLIP's, with only the merges
that the grammar's words need. The folder `controlnet` is a ControlNet for it.

**Data**: pictures that a program draws (`tests/demo_model/scenes.py` in turbochain's repository). Where the objects
lie is a function of the starting noise, so that each seed has one right picture. One in four combinations of size,
colour, shape and background was never shown; `tests/demo_model/metrics.json` has the scores on those.

**Training** (`tests/demo_model/train.py`): torch {torch}, {processor}.

| stage | steps | batch | time |
| --- | --- | --- | --- |
{stages}

{note}Everything here, weights and data, is the project's own work, under the Apache License 2.0.
"""


def main() -> None:
    """Write the checkpoint, the card, the licence and the picture of the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--output", type=Path, default=ROOT / "export/demo")
    parser.add_argument("--note", default="", help="what else the card should say of the training")
    arguments = parser.parse_args()
    run = TrainingRun(arguments.work)
    last = next(stage for stage in reversed(STAGES) if (run.work / f"{stage}.pt").is_file())
    write(run, last, arguments.output, arguments.note)
    plot(json.loads((arguments.output / "training.json").read_text()), HERE / "loss.png")
    size = sum(path.stat().st_size for part in PARTS for path in (arguments.output / part).glob("*.safetensors"))
    assert size <= LIMIT, f"{size} bytes of weights"
    print(f"{arguments.output}: {size / 1e6:.2f} MB of weights")


def write(run: TrainingRun, stage: str, folder: Path, note: str) -> None:
    """The pipeline of the mean weights of `stage`, as fp16, into `folder`."""
    tokenizer = run.tokenizer()
    parts = {
        "vae": architecture.vae(),
        "text_encoder": architecture.text_encoder(tokenizer),
        "unet": architecture.unet(),
    }
    weights = {"vae": run.state("vae")["mean"]["vae"], **run.state(stage)["mean"]}
    for name, part in parts.items():
        part.load_state_dict(weights[name])
        part.to(torch.float16)
    parts["vae"].register_to_config(scaling_factor=scale(run))
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=architecture.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    architecture.write_tokenizer(folder / "tokenizer")
    trained = {
        "stages": {s: run.history(s) for s in STAGES if (run.work / f"{s}.pt").is_file()},
        "pictures": {str(pixels): n for pixels, n in PICTURES.items()},
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "torch": torch.__version__,
        "processor": processor(),
    }
    (folder / "training.json").write_text(json.dumps(trained) + "\n")
    (folder / "README.md").write_text(card(trained, note))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def card(trained: dict[str, Any], note: str) -> str:
    """The model card."""
    stages = "\n".join(
        f"| {stage} | {of['steps']} | {of['batch']} | {of['seconds'] / 60:.0f} min |"
        for stage, of in trained["stages"].items()
    )
    sizes = ", ".join(f"{name} {count:,}" for name, count in trained["parameters"].items())
    note = f"{textwrap.fill(note, 120)}\n\n" if note else ""
    return CARD.format(stages=stages, sizes=sizes, note=note, torch=trained["torch"], processor=trained["processor"])


def plot(trained: dict[str, Any], path: Path) -> None:
    """The loss of every stage over its steps, smoothed, one panel each."""
    stages = trained["stages"]
    figure, panels = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), layout="constrained")
    for panel, (stage, of) in zip(panels, stages.items(), strict=True):
        panel.semilogy(np.linspace(0, of["steps"], len(of["losses"])), of["losses"])
        panel.set(title=stage, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
