"""Figures of a chain that is loaded."""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from turbochain.runtime import Pipeline, PipelineOutput
from turbochain.runtime.backends.contract import Observe
from turbochain.runtime.checks import metrics

PROMPT = "a photo of a cat wearing a red hat, studio light"


def draw(
    pipe: Pipeline,
    seed: int = 0,
    steps: int = 1,
    prompt: str = PROMPT,
    known: bool = False,
    observe: Observe | None = None,
) -> PipelineOutput:
    """Draw a batch of one prompt; unless it is `known`, its text encoders run."""
    if not known:
        pipe.prompt_cache.clear()
    prompts = [prompt] * pipe.bundle.open_chain().batch
    return pipe(prompts, seed=seed, num_inference_steps=steps, output_type="uint8", observe=observe)


def figures(pipe: Pipeline, runs: int) -> dict[str, Any]:
    """Return the median seconds of a call: as one graph, with a known prompt, and stage by stage with each stage's."""
    first = draw(pipe)
    whole = [draw(pipe, seed) for seed in range(runs)]
    draw(pipe, known=True)
    known = [draw(pipe, seed, known=True) for seed in range(runs)]
    stages: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        stages.setdefault(name, []).append(seconds)

    apart = [draw(pipe, seed, observe=note) for seed in range(runs)]
    return {
        "uncaptured": first.uncaptured,
        "one_graph": _medians(whole),
        "known_prompt": _medians(known),
        "stage_by_stage": _medians(apart),
        "stages": {name: statistics.median(seconds) for name, seconds in stages.items()},
    }


def _medians(made: list[PipelineOutput]) -> Mapping[str, float]:
    return {
        "seconds": statistics.median(of.seconds for of in made),
        "gpu_seconds": statistics.median(of.device_seconds for of in made),
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB; 120 for equal ones."""
    return metrics.psnr(one, other)
