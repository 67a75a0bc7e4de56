"""Count the launches of a call, and draw one as an array."""

from collections import Counter
from typing import Any

import numpy as np

from turbochain.runtime import Pipeline

PROMPTS = ["a red fox", "", "рыжий кот", "a robot 🤖", "a cat, oil painting", "a lighthouse", "窓辺の猫"]


class Ran(Counter[str]):
    """How often each graph was launched in the calls that it observes."""

    def __call__(self, graph: str, seconds: float) -> None:
        assert seconds > 0
        self.update([graph])


def uint8(pipe: Pipeline, prompt: Any, **arguments: Any) -> np.ndarray:
    return pipe(prompt, output_type="uint8", **arguments).images
