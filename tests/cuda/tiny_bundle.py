"""The smallest chain in which a GPU's executor does everything that it ever does, for what is tried a thousand times.

A prompt and a picture are encoded side by side, one step or two follow, a stream outlives the call, and a mode has a
graph of its own, which is loaded when it is first used and needs more scratch memory.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import small_bundle
from small_bundle import Content
from small_graphs import CHANNELS, LENGTH, weights

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, Chain, Engine, Feed, Stage, TableEntry

LATENTS = f"float[1,{CHANNELS},1,1]"
TEXT_ENCODER = f"""
text_encoder (int32[1,{LENGTH}] input_ids) => (float[1,{CHANNELS}] prompt_embeds)
<{weights("table")}, int64[1] tokens = {{1}}> {{
    gathered = Gather (table, input_ids)
    prompt_embeds = ReduceSum <keepdims = 0> (gathered, tokens)
}}"""
UNET = f"""
unet ({LATENTS} latents, {LATENTS} time, float[1,{CHANNELS}] prompt_embeds, {LATENTS} residual, {LATENTS} stream)
    => ({LATENTS} next_latents, {LATENTS} next_stream) <int64[2] places = {{2, 3}}> {{
    text = Unsqueeze (prompt_embeds, places)
    steered = Add (latents, residual)
    timed = Add (steered, time)
    told = Add (timed, text)
    all = Add (told, stream)
    half = Constant <value_float = 0.5> ()
    next_latents = Mul (all, half)
    next_stream = Mul (next_latents, half)
}}"""
VAE_DECODER = f"""
vae_decoder ({LATENTS} next_latents) => (uint8[1,8,8,3] image)
<{weights("decode")}, int64[2] flat = {{1, {CHANNELS}}}, int64[4] whole = {{1, 8, 8, 3}}> {{
    row = Reshape (next_latents, flat)
    colours = MatMul (row, decode)
    contrast = Constant <value_float = 30.0> ()
    grey = Constant <value_float = 128.0> ()
    black = Constant <value_float = 0.0> ()
    white = Constant <value_float = 255.0> ()
    levels = Mul (colours, contrast)
    shifted = Add (levels, grey)
    clipped = Clip (shifted, black, white)
    pixels = Expand (clipped, whole)
    image = Cast <to = 2> (pixels)
}}"""


def _encoder(name: str, picture: str, weight: str, result: str, side: int) -> str:
    """Return the text of a graph that makes latents of the mean colour of a picture of side × side pixels."""
    return f"""
{name} (uint8[1,{side},{side},3] {picture}) => ({LATENTS} {result})
<{weights(weight)}, int64[2] inside = {{1, 2}}, int64[2] places = {{2, 3}}> {{
    values = Cast <to = 1> ({picture})
    mean = ReduceMean <keepdims = 0> (values, inside)
    white = Constant <value_float = 255.0> ()
    unit = Div (mean, white)
    mixed = MatMul (unit, {weight})
    {result} = Unsqueeze (mixed, places)
}}"""


CHAIN = Chain(
    task=IMAGE_TO_IMAGE,
    size=(8, 8),
    batch=1,
    K=1,
    modes=("control",),
    stages=(
        Stage("text_encoder", "prompt", "text"),
        Stage("vae_encoder", "image", "image_latents"),
        Stage("controlnet", "image", "residuals", if_=("control",)),
        Stage("unet", "step", "state"),
        Stage("vae_decoder", "end", "picture"),
    ),
    feeds={
        "input_ids": Feed("ids", "call"),
        "input_image": Feed("image", "call"),
        "control_image": Feed("image", "call"),
        "residual": Feed("zeros", "held"),
        "stream": Feed("zeros", "held"),
        "time": Feed("column", "step"),
    },
    draws=(),
    carry={"next_latents": "latents"},
    keep={"next_stream": "stream"},
    tables_file="tables/tiny.safetensors",
    tables={"1": TableEntry(1, 1), "2": TableEntry(2, 2)},
    output="image",
)
CONTENT = Content(
    {
        "text_encoder": ("text_encoder", TEXT_ENCODER),
        "vae_encoder": ("vae_encoder", _encoder("vae_encoder", "input_image", "encode", "latents", 8)),
        "controlnet": ("controlnet", _encoder("controlnet", "control_image", "control", "residual", 32)),
        "unet": ("unet", UNET),
        "vae_decoder": ("vae_decoder", VAE_DECODER),
    },
    {IMAGE_TO_IMAGE: CHAIN},
    {IMAGE_TO_IMAGE: small_bundle.arrays(IMAGE_TO_IMAGE, 1, {1: 1, 2: 2})},
)


def write(folder: Path) -> Path:
    """Write the bundle; its engines count as verified, as nothing is recorded that they could be compared with."""
    path = small_bundle.write_content(folder / "tiny.bundle", CONTENT, [])
    chain = Bundle.open(path).open_chain()
    for file in path.glob("engines/*/engine.json"):
        verified = {"checks": {chain.name: ()}, "verified": {chain.name: chain.digest}}
        file.write_text(strict_json.write(replace(strict_json.read(Engine, file), **verified)))
    return path


def call(prompt: str, picture: int, control: int | None = None, steps: int = 2) -> dict[str, Any]:
    """Return a call with pictures of one colour each, which is drawn of these seeds; with `control` it has the mode."""
    given = {"input_image": _picture(picture, 8)}
    if control is not None:
        given["control_image"] = _picture(control, 32)
    modes = [] if control is None else ["control"]
    return {"chain": IMAGE_TO_IMAGE, "prompt": prompt, "inputs": given, "modes": modes, "num_inference_steps": steps}


def _picture(seed: int, side: int) -> np.ndarray:
    colour = np.random.default_rng(seed).integers(0, 256, 3, np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colour, (1, side, side, 3)))
