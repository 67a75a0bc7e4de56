"""The calls that are made over the stand-in: both chains of the small bundle, in all of their modes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import small_bundle
from PIL import Image
from small_bundle import I2I, T2I
from small_calls import GUIDED, PICTURES, cases, numbers
from standin import Runtime

from turbochain.runtime import Bundle, Pipeline, PipelineOutput
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from turbochain.runtime.request import Request

NEW: dict[str, Any] = {"chain": T2I, "prompt": ["a red cat", "a dog"]}
OTHER: dict[str, Any] = {"chain": T2I, "prompt": ["the snow", "red snow"]}
PICTURE: dict[str, Any] = {
    "chain": I2I,
    "prompt": ["a red dog", "the cat"],
    "inputs": {"input_image": PICTURES[0], **numbers()},
}
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

IMAGES = [Image.fromarray(image) for image in np.random.default_rng(7).integers(0, 256, (2, 64, 64, 3), np.uint8)]
MASK = Image.fromarray(np.repeat([[0, 255]], 32, 1).repeat(64, 0).astype(np.uint8))
OF_TASK: Mapping[str, Sequence[dict[str, Any]]] = {
    TEXT_TO_IMAGE: (
        *({"prompt": "a cat", "seed": steps, "num_inference_steps": steps} for steps in (1, 2, 3, 4)),
        {"prompt": "a dog"},
        {"prompt": "a cat", "guidance_scale": 3.0},  # zeros if the chain has them, else the encoding of ""
        {"prompt": "a fox", "guidance_scale": 3.0, "negative_prompt": "fog"},
        {"prompt": "a dog", "guidance_scale": 2.0, "negative_prompt": "fog"},
    ),
    IMAGE_TO_IMAGE: (
        {"prompt": "a fox", "image": IMAGES[0], "num_inference_steps": 2, "strength": 1.0},
        {"prompt": "a cat", "image": IMAGES[0], "num_inference_steps": 2, "strength": 0.5},
        {"prompt": "a dog", "image": IMAGES[1], "num_inference_steps": 4, "strength": 0.5, "seed": 6},
        {"prompt": "a dog", "image": IMAGES[1], "num_inference_steps": 2, "strength": 0.5, "guidance_scale": 3.0},
    ),
    INPAINTING: (
        {"prompt": "a cat", "image": IMAGES[0], "mask_image": MASK, "num_inference_steps": 2, "strength": 1.0},
        {"prompt": "a cat", "image": IMAGES[1], "mask_image": MASK, "num_inference_steps": 2, "strength": 0.7},
        {"prompt": "a dog", "image": IMAGES[1], "mask_image": MASK, "num_inference_steps": 2, "strength": 0.7},
        {
            **{"prompt": "a cat", "negative_prompt": "fog", "guidance_scale": 3.0, "seed": 6},
            **{"image": IMAGES[0], "mask_image": MASK, "num_inference_steps": 2, "strength": 1.0},
        },
    ),
}
"""Calls of the miniatures' chains, by task: known prompts and images and new ones, each step count, guidance."""


def of_chains(path: Path) -> list[dict[str, Any]]:
    """Return calls of every chain of a bundle."""
    chains = Bundle.open(path).manifest.chains
    return [{"chain": name, **call} for name, chain in chains.items() for call in OF_TASK[chain.task]]


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
