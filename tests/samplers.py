"""Make diffusers' schedulers with Stable Diffusion's betas, alone or in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import diffusers

from turbochain.export.sources.checkpoint import Checkpoint

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BOUND = 1e-4  # relative L2; schedulers cancel in fp32: up to 2.6e-5 was measured, a clipped one is off by 0.26 or more
OF_EULER = {key: value for key, value in BETAS.items() if key != "clip_sample"}


def write(folder: Path, name: str, pipeline: str, **options: Any) -> Checkpoint:
    """As much of a checkpoint as says which scheduler it has."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name, **options}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "scheduler": ["diffusers", name]}))
    return Checkpoint(folder, None)


def sampler(name: str, **options: Any) -> Any:
    return getattr(diffusers, name).from_config({**BETAS, **options})
