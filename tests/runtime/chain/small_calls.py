"""Calls of the chains of `small_bundle`, and those that are recorded in it."""

from typing import Any

import by_hand
import numpy as np
from small_bundle import BATCH, I2I, LATENTS, T2I

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
