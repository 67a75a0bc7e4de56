"""The calls that are made over the stand-in: both chains of the small bundle, in all of their modes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import small_bundle
from small_bundle import I2I, T2I
from small_calls import GUIDED, PICTURES, cases, numbers
from standin import Runtime

from turbochain.runtime import Pipeline, PipelineOutput
from turbochain.runtime.request import Request

NEW: dict[str, Any] = {"chain": T2I, "prompt": ["a red cat", "a dog"]}
OTHER: dict[str, Any] = {"chain": T2I, "prompt": ["the snow", "red snow"]}
PICTURE: dict[str, Any] = {"chain": I2I, "prompt": ["a red dog", "the cat"], "inputs": {"input_image": PICTURES[0], **numbers()}}
CONTROLLED = PICTURE | {"inputs": PICTURE["inputs"] | {"control_image": PICTURES[1]}, "modes": ["control"]}
ALL: Sequence[dict[str, Any]] = (
    NEW,
    NEW | {"seed": 6},  # a known prompt
    NEW | {"inputs": GUIDED, "modes": ["guidance"], "negative_prompt": "red"},
    PICTURE,
    CONTROLLED,
    PICTURE | {"prompt": ["in the snow", "a cat"]},  # it goes on with the stream
    CONTROLLED | {"prompt": NEW["prompt"]},  # a prompt that the other chain knows
    OTHER | {"num_inference_steps": 3},
    NEW | {"num_inference_steps": 3, "output_type": "latent"},
    # Plans that are known, with another prompt, picture or noise.
    PICTURE | {"prompt": ["red", "a dog in snow"], "inputs": {"input_image": PICTURES[2], **numbers()}},
    PICTURE | {"prompt": ["a cat in snow", "the dog"], "inputs": {"input_image": PICTURES[2], **numbers()}, "seed": 9},
    PICTURE | {"prompt": ["the snow", "in red snow"], "inputs": {"input_image": PICTURES[3], **numbers()}, "seed": 8},
)
"""Batch 2; new prompts and known ones; each chain without its mode and with it."""


def write(folder: Path) -> Path:
    """Write the small bundle, with both chains verified on the CPU."""
    path = small_bundle.write(folder / "small.bundle", cases())
    with on_cpu(path) as pipe:
        draw(pipe, PICTURE)
    return path


def on_cpu(path: Path) -> Pipeline:
    """Load a bundle on the CPU backend, whose pictures are the right ones."""
    return Pipeline.load(path, backend="onnxruntime", device="cpu")


def output(pipe: Pipeline, call: dict[str, Any], **more: Any) -> PipelineOutput:
    """Make a call's pictures."""
    given = {"seed": 5, "output_type": "uint8", **call}
    request = Request.make(pipe.bundle.open_chain(given.pop("chain", T2I)), **given)
    return pipe.draw(request, **more)


def draw(pipe: Pipeline, call: dict[str, Any]) -> np.ndarray:
    """Make a call's pictures; they come of one graph."""
    made = output(pipe, call)
    assert made.uncaptured is None
    return made.images


def assert_nothing_left(runtime: Runtime) -> None:
    """Everything was given back, and nothing happened that must not."""
    assert (runtime.problems(), runtime.leaked()) == ([], [])
