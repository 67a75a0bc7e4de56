"""Chains whose weights are drawn where they run: nothing large has to be brought to a machine."""

from collections.abc import Mapping
from pathlib import Path

import torch

import torch_stages
from torch_stages import Modules, Place
from turbochain.export.families import Shape
from turbochain.export.remedies import Remedy
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle

from . import hollow


def models(preset: str, device: torch.device | str = "cpu") -> dict[str, torch.nn.Module]:
    """Return component → model with random weights in fp32; on a CPU those of the synthetic checkpoint."""
    parts = synthetic.models(preset, device=device)
    synthetic.draw_weights(parts, torch.Generator(device).manual_seed(0))
    return parts


def chain(
    checkpoint: Path,
    parts: Mapping[str, torch.nn.Module],
    size: int,
    place: Place,
    precision: str,
    folder: Path,
    batch: int = 1,
) -> tuple[Bundle, Modules]:
    """Return a bundle and its stages, which have the models' weights: size × size pixels, `batch` pictures per pass."""
    bundle = hollow.of_models(checkpoint, parts, Shape(size, size, batch), folder)
    graphs = torch_stages.placed(bundle)
    remedies = {name: Remedy(graph.spec.precision or precision) for name, graph in graphs.items()}
    return bundle, torch_stages.of_parts(parts, bundle, remedies, place.device)
