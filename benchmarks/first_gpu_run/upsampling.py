"""Step: nearest ×2 and a 3×3 convolution, against the one transposed convolution that is equal to both."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from turbochain.runtime.backends.upsampling import transposed_kernel

from .results import Report
from .timing import median

SHAPES = ((512, 64), (512, 128), (256, 256))
"""Channels and side of what the VAE decoder upsamples at 512×512."""


def run(
    report: Report,
    prepared: Path,
    device: str = "cuda",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float16,
    runs: int = 30,
) -> None:
    """Report for each shape and memory layout the seconds of both, and how far apart their results are."""
    torch.backends.cudnn.benchmark = True
    where = torch.device(device)
    for channels, side in shapes:
        for layout in (torch.channels_last, torch.contiguous_format):
            name = f"{channels}x{side}x{side} {str(layout).removeprefix('torch.')}"
            report.attempt(name, partial(compare, channels, side, layout, where, dtype, runs))


def compare(
    channels: int, side: int, layout: torch.memory_format, device: torch.device, dtype: torch.dtype, runs: int
) -> dict[str, Any]:
    """Return the seconds of each way, and the relative L2 distance of each from both in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator, device=device)
    w = torch.randn(channels, channels, 3, 3, generator=generator, device=device) / (3 * channels**0.5)
    bias = torch.randn(channels, generator=generator, device=device)
    exact = _apart(x, w, bias)
    given = [t.to(dtype).contiguous(memory_format=layout) for t in (x, w, transposed(w))]
    x, w, merged, bias = *given, bias.to(dtype)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "apart": lambda: _apart(x, w, bias),
        "merged": lambda: functional.conv_transpose2d(x, merged, bias, stride=2, padding=1),
    }
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, way in ways.items():
            error = torch.linalg.vector_norm(way().float() - exact) / torch.linalg.vector_norm(exact)
            found |= {f"{name}_error": float(error), f"{name}_seconds": median(way, device, runs)}
    return {**found, "ratio": found["apart_seconds"] / found["merged_seconds"]}


def _apart(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(functional.interpolate(x, scale_factor=2.0, mode="nearest"), w, bias, padding=1)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight [C_in, C_out, 4, 4] that does what nearest ×2 and then this one [C_out, C_in, 3, 3] do."""
    return torch.from_numpy(transposed_kernel(weight.cpu().numpy())).to(weight)
