"""Step: a model in full size with random weights. What does one graph buy over diffusers' own loop?"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_stages
from torch_stages import OnGpu, Place
from turbochain.export import load
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE

from . import drawn
from .chains import PROMPT, draw, figures, psnr
from .results import Report
from .timing import median


def run(
    report: Report,
    prepared: Path,
    preset: str,
    place: Callable[[], Place] = OnGpu,
    size: int = 512,
    precision: str = "fp16",
    runs: int = 30,
) -> None:
    """Report diffusers' seconds and ours, and how far apart the pictures are."""
    where, checkpoint = place(), prepared / preset
    parts = report_seconds(report, "drawing the weights", lambda: drawn.models(preset, where.device))
    with tempfile.TemporaryDirectory() as folder:
        bundle, made = drawn.chain(checkpoint, parts, size, where, precision, Path(folder, "hollow.bundle"))
        # diffusers first: it moves an fp16 VAE to fp32 and back, and our graph would hold the weights' old addresses.
        theirs: dict[str, np.ndarray] = {}
        for name, change in WAYS.items():
            change(parts)
            pipe = diffusers_own(checkpoint, parts)
            report.attempt(f"diffusers, {name}", lambda: _diffusers(pipe, name, theirs, where.device, size, runs))  # noqa: B023
        with torch_stages.pipeline(bundle, made, where) as ours:
            report.attempt("ours", lambda: figures(ours, runs))
            report.attempt("PSNR", lambda: {name: psnr(draw(ours).images, of) for name, of in theirs.items()})


def report_seconds(report: Report, name: str, work: Callable[[], Any]) -> Any:
    """Return what `work` returns, and write down how long it took."""
    start = time.perf_counter()
    value = work()
    report.add(name, {"seconds": time.perf_counter() - start})
    return value


def diffusers_own(checkpoint: Path, parts: Mapping[str, torch.nn.Module]) -> Any:
    """Return diffusers' pipeline of these models."""
    given = Checkpoint(checkpoint)
    family, index = given.family, given.index
    kind = load.pipeline_class(given, TEXT_TO_IMAGE)
    tokenizers = {folder: load.tokenizer(given, folder) for folder in family.tokenizers.values()}
    settings = {name: value for name, value in index.items() if name == "force_zeros_for_empty_prompt"}
    pipe = kind(**settings, **parts, **tokenizers, scheduler=load.scheduler(given), **family.pipeline_options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _diffusers(
    pipe: Any, name: str, theirs: dict[str, np.ndarray], device: torch.device, size: int, runs: int
) -> dict[str, float]:
    """Return diffusers' median seconds from a prompt to a uint8 picture in host memory; keep the picture."""

    def once() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        given = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": size, "width": size, "output_type": "pt"}
        images = pipe(PROMPT, generator=generator, **given).images
        levels = (images.float() * 255).round().to(torch.uint8)
        theirs[name] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    with torch.inference_mode():
        return {"seconds": median(once, device, runs)}


def _as_it_is(parts: Mapping[str, Any]) -> None:
    torch.backends.cudnn.benchmark = False


def _tuned(parts: Mapping[str, Any]) -> None:
    torch.backends.cudnn.benchmark = True
    parts["vae"].register_to_config(force_upcast=False)  # random weights stay in fp16's range


WAYS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "channels last": _as_it_is,
    "channels last, cudnn.benchmark, fp16 VAE": _tuned,
}
