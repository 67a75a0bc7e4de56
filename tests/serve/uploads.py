"""Make the files that a client uploads."""

import io
from typing import Any

import numpy as np
from PIL import Image


def file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    found = io.BytesIO()
    image.save(found, kind, **how)
    return found.getvalue()


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture of random levels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def holed(size: tuple[int, int]) -> Image.Image:
    """A picture whose left half is transparent."""
    found = Image.new("RGBA", size, (0, 0, 0, 255))
    found.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return found
