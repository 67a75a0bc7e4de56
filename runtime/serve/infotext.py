"""What A1111's clients are told about a picture: the values that it was really drawn with."""

import importlib.metadata
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.guidance import GUIDANCE
from turbochain.runtime.request import Request
from turbochain.runtime.serve.models import Model

SAMPLER = "built-in"
"""A bundle has one sampler: its tables hold the values of the scheduler that it was built with."""
UNIT = "ControlNet 0"
"""A1111's name for the only unit."""

_LORA = re.compile(r"<(?:lora|lyco):([^>]+)>")  # the second is A1111's other name of the first


@dataclass(frozen=True)
class Used:
    """The values of one picture, in A1111's terms."""

    model: str
    prompt: str  # as it was sent: it names the adapters
    negative_prompt: str  # "" if none was read
    seed: int
    width: int
    height: int
    steps: int
    cfg_scale: float  # 1.0 if there was no guidance: that is what A1111 calls it
    denoising_strength: float | None  # None if no image was given
    controlnet: str | None  # what its unit says

    @classmethod
    def of(cls, model: Model, request: Request, prompt: str, controlnet: str | None) -> "Used":
        """Return the values that a one-picture request is drawn with; `prompt`, `controlnet`: as the client sent
        them."""
        chain = model.bundle.open_chain(request.chain)
        entry = chain.chain.tables[request.table]
        height, width = chain.size
        return cls(
            model=model.name,
            prompt=prompt,
            negative_prompt=next(iter(request.negative_prompts), ""),
            seed=request.seeds[0],
            width=width,
            height=height,
            steps=entry.steps,
            cfg_scale=_scale(request, entry.guidance_scale),
            denoising_strength=_strength(chain, request.table),
            controlnet=controlnet,
        )

    @property
    def infotext(self) -> str:
        """Return the text that A1111 writes into a picture's file."""
        values = {
            "Steps": self.steps,
            "Sampler": SAMPLER,
            "CFG scale": self.cfg_scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            "Denoising strength": self.denoising_strength,
            UNIT: self.controlnet,
            "Version": version(),
        }
        last = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
        negative = f"Negative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        return "\n".join(filter(None, (self.prompt, negative, last)))


def info(first: Used, ready: Sequence[Used], batch_size: int) -> str:
    """Return the `info` of an answer, which is JSON as a string.

    `first`: the first picture that was asked for; `ready`: those that are in the answer, all unless it was interrupted.
    """
    found: dict[str, Any] = {
        "prompt": first.prompt,
        "all_prompts": [used.prompt for used in ready],
        "negative_prompt": first.negative_prompt,
        "all_negative_prompts": [used.negative_prompt for used in ready],
        "seed": first.seed,
        "all_seeds": [used.seed for used in ready],
        "width": first.width,
        "height": first.height,
        "sampler_name": SAMPLER,
        "cfg_scale": first.cfg_scale,
        "steps": first.steps,
        "batch_size": batch_size,
        "sd_model_name": first.model,
        "denoising_strength": first.denoising_strength,
        "extra_generation_params": {} if first.controlnet is None else {UNIT: first.controlnet},
        "index_of_first_image": 0,
        "infotexts": [used.infotext for used in ready],
        "styles": [],
        "job_timestamp": timestamp(time.time()),
        "version": version(),
    }
    return json.dumps(found)


def split_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """Return a prompt without <lora:NAME:SCALE>, and what it names. Raises InputError for another form of these."""
    found = []
    for content in _LORA.findall(prompt):
        name, _, scale = content.partition(":")
        try:
            found.append((name, float(scale or 1)))
        except ValueError:
            raise InputError(
                f"prompt: <lora:{content}>: a name and one number were expected, such as <lora:{name}:0.8>"
            ) from None
    return _LORA.sub("", prompt), found


def timestamp(seconds: float) -> str:
    """Return a time since 1970 as A1111 writes it."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))


@cache
def version() -> str:
    """Return the program and its version."""
    return f"turbochain {importlib.metadata.version('turbochain')}"


def _scale(request: Request, embedded: float | None) -> float:
    if embedded is not None:
        return embedded
    if GUIDANCE not in request.modes:
        return 1.0
    return round(float(dict(request.inputs)["guidance_scale"].value[0]), 6)  # of fp32


def _strength(chain: OpenChain, table: str) -> float | None:
    """Return the strength that a table follows; if it is a share of the steps, the least one with the same effect."""
    entry = chain.chain.tables[table]
    if "strength" not in chain.chain.defaults:
        return None
    return entry.strength if entry.strength is not None else (entry.steps - entry.begin) / entry.steps


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
