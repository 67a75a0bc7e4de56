"""Make calls of the chains of `small_bundle`, those among them that are recorded in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
from small_graphs import BATCH, I2I, LATENTS, T2I

from turbochain.runtime import Pipeline
from turbochain.runtime.request import Request

PROMPTS = ["a red cat", "a dog in the snow the the the a cat"]  # the second is longer than what is read
SCALES = [0.5, 0.0, -1.5]
BLOCKS = np.random.default_rng(3).integers(0, 256, (4, BATCH, *LATENTS[I2I][2:], 3), np.uint8)
PICTURES = BLOCKS.repeat(8, 2).repeat(8, 3)
GUIDED = {"guidance_scale": np.array([2.5], np.float32)}


def numbers(p: float = 0.75, q: float = 0.5) -> dict[str, np.ndarray]:
    """What a call of the second chain is given beside a picture."""
    scales = np.array(SCALES, np.float32)[:, None]
    return {"p": np.array([p], np.float32), "q": np.array([q], np.float32), "conditioning_scale": scales}


def cases() -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Recorded calls of both chains in each mode."""
    made = {
        (T2I, "", 2): by_hand.text_to_image(PROMPTS, 7, 2),
        (T2I, "guidance", 3): by_hand.text_to_image(PROMPTS, 7, 3, 2.5, ["snow", "dog"]),
        (I2I, "", 2): by_hand.image_to_image(PROMPTS, PICTURES[0], 7, 0.75, 0.5, SCALES),
        (I2I, "control", 2): by_hand.image_to_image(PROMPTS, PICTURES[0], 7, 0.75, 0.5, SCALES, control=PICTURES[1]),
    }
    return [
        (
            {
                "chain": chain,
                "modes": [mode] if mode else [],
                "prompt": PROMPTS,
                "seed": 7,
                "table": str(steps),
            },
            tensors,
        )
        for (chain, mode, steps), tensors in made.items()
    ]


def assert_same(picture: np.ndarray, reference: np.ndarray) -> None:
    """At most one level, in one of a thousand values: PyTorch's noise is within 1e-6 of ours."""
    assert picture.dtype == np.uint8 and picture.shape == reference.shape
    apart = np.abs(picture.astype(int) - reference)
    assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3
    assert reference.std() > 10  # there is something to see


def drawn(pipe: Pipeline, chain: str, **arguments: Any) -> np.ndarray:
    """The pictures of a call."""
    arguments = {"prompt": PROMPTS, "seed": 5, "output_type": "uint8", **arguments}
    request = Request.make(pipe.bundle.open_chain(chain), **arguments)
    images: np.ndarray = pipe.draw(request).images
    return images


def changed(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest."""
    manifest = json.loads((path / "bundle.json").read_text())
    edit(manifest)
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path
