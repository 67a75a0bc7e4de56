"""SDXL's time ids are those that diffusers' pipeline gives its UNet."""

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from image_graphs import spied

from turbochain.export.families import Shape, sdxl


def test_height_comes_before_width(checkpoints: dict[str, Path]) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(checkpoints["sdxl"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with spied(pipe.unet.add_time_proj, "forward") as calls:
        pipe("", height=72, width=88, num_inference_steps=1, guidance_scale=0.0, output_type="latent")
    (((read,), _),) = calls
    (ours,) = sdxl.FAMILY.constants["time_ids_embeds"](Shape(height=72, width=88, batch=1))
    assert list(ours) == read.tolist()
