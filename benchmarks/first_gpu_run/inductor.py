"""Step: the stages compiled by Inductor, under our one graph. How near is that to the bar?"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import torch_stages
from torch_stages import Modules, OnGpu, Place

from . import drawn
from .chains import draw, figures, psnr
from .full_size import report_seconds
from .results import Report

ORDER = ("vae_decoder", "unet", "text_encoder", "text_encoder_2")
"""What is most of the time first: the limit may end the step."""


def run(
    report: Report,
    prepared: Path,
    preset: str,
    place: Callable[[], Place] = OnGpu,
    size: int = 512,
    precision: str = "fp16",
    runs: int = 30,
    compiled: Callable[..., Modules] = torch_stages.compiled,
) -> None:
    """Report the chain's figures after each stage that was compiled, how long that took, and the picture's PSNR."""
    torch.backends.cudnn.benchmark = True
    where = place()
    parts = drawn.models(preset, where.device)
    with tempfile.TemporaryDirectory() as folder:
        bundle, eager = drawn.chain(prepared / preset, parts, size, where, precision, Path(folder, "hollow.bundle"))
        with torch_stages.pipeline(bundle, eager, where) as pipe:
            right = draw(pipe).images
        made = dict(eager)
        for name in filter(eager.__contains__, ORDER):
            one = {name: eager[name]}
            made |= report_seconds(report, f"compiling {name}", partial(compiled, one, bundle, where.device))
            with torch_stages.pipeline(bundle, made, place()) as pipe:
                report.attempt(f"with {name} compiled", partial(figures, pipe, runs))
                report.add(f"PSNR with {name} compiled", psnr(draw(pipe).images, right))
