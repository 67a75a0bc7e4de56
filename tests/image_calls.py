"""Make calls of image-to-image and inpainting with diffusers' own pipelines, and compare them with ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from conftest import SIZE
from PIL import Image
from test_parity import PROMPTS

from turbochain.export.recording import sample_image
from turbochain.runtime import Pipeline

Call = dict[str, Any]  # arguments of Pipeline.__call__

Pairs = list[tuple[int, int]]

PAIRS: Pairs = [(steps, made) for steps in range(1, 5) for made in range(1, steps + 1)]
"""num_inference_steps, and how many of them are made: what `strength` decides."""
FEW: Pairs = [(1, 1), (3, 2), (4, 1), (4, 4)]
"""Some of them, for `make test`."""


def strength(steps: int, made: int) -> float:
    """Return a strength at which `made` of the steps are made, and exactly 1 if all are."""
    return 1.0 if made == steps else (made + 0.5) / steps


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture in RGB; `size` is width, height."""
    return Image.fromarray(sample_image(size[1], size[0], seed))


def mask(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a mask with all grey levels and no edge at a multiple of 8; `size` is width, height."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    levels = 127.5 + 140 * np.sin(5 * x + 3 * y + seed) * np.cos(4 * y - seed)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def prompts(first: int, count: int) -> list[str]:
    return [PROMPTS[(first + i) % len(PROMPTS)] for i in range(count)]


def seeded(seed: int | list[int]) -> Any:
    """Return a torch generator, or one for each of several seeds."""
    one = [torch.Generator("cpu").manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
    return one if isinstance(seed, list) else one[0]


def theirs(pipe: Any, call: Call, **more: Any) -> np.ndarray:
    """Return what diffusers' pipeline makes of a call of ours: pictures [N, H, W, 3] uint8, or latents."""
    arguments = {"guidance_scale": 0.0, **call, **more}
    if "seed" in arguments:
        arguments["generator"] = seeded(arguments.pop("seed"))
    if isinstance(arguments.get("latents"), np.ndarray):
        arguments["latents"] = torch.from_numpy(arguments["latents"])
    images = pipe(**arguments).images
    return images.numpy() if torch.is_tensor(images) else np.stack([np.asarray(image) for image in images])


def ours(pipe: Pipeline, call: Call) -> np.ndarray:
    """Return what our pipeline makes of a call: pictures [N, H, W, 3] uint8, or latents."""
    images: np.ndarray = pipe(**{"guidance_scale": 0.0, "output_type": "uint8", **call}).images
    return images


@dataclass
class Apart:
    """How far pictures are from diffusers'. The bounds for fp32: 0.1% of each one's values, 0.05% of all together."""

    largest: int = 0
    worst: float = 0.0  # share of a picture's values that differ
    shares: list[float] = field(default_factory=list)  # of each picture

    def add(self, result: np.ndarray, reference: np.ndarray) -> None:
        """Compare pictures [N, H, W, 3]; at most 1 level, in at most 0.1% of the values of each."""
        assert result.dtype == np.uint8 and result.shape == reference.shape
        apart = np.abs(result.astype(int) - reference)
        shares = [float((picture > 0).mean()) for picture in apart]
        self.largest = max(self.largest, int(apart.max()))
        self.worst = max(self.worst, *shares)
        self.shares += shares
        assert self.largest <= 1 and self.worst <= 1e-3, self

    def close(self) -> None:
        """See that at most 0.05% of all values differ."""
        assert self.shares and np.mean(self.shares) <= 5e-4, self

    def __repr__(self) -> str:
        pooled = np.mean(self.shares) if self.shares else 0.0
        return f"{len(self.shares)} pictures: {self.largest} level, {pooled:.4%} pooled, {self.worst:.4%} the worst"


@contextmanager
def compared() -> Iterator[Apart]:
    """Compare pictures one call after the other, and all of them together at the end."""
    apart = Apart()
    yield apart
    apart.close()


def assert_same(result: np.ndarray, reference: np.ndarray) -> None:
    """Compare the pictures, or the latents, of one call."""
    if result.dtype == np.float32:
        assert result.shape == reference.shape
        assert np.linalg.norm(result - reference) <= 1e-4 * np.linalg.norm(reference)
        return
    with compared() as apart:
        apart.add(result, reference)
