"""`turbochain generate`: draw one picture and write it into a file."""

import argparse
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.choice import chain_of
from turbochain.runtime.commands import adapter, console
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import canny
from turbochain.runtime.inputs.pictures import open_picture, pixels
from turbochain.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PROMPT, NEGATIVE_PROMPT = "--prompt", "--negative-prompt"
NUMBERS_OF_CONTROL = (
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("adapter_conditioning_scale", "adapter_conditioning_factor"),
)


def add_arguments(parser: Any) -> None:
    """Add what a picture is made of, and where it goes."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument(
        PROMPT, metavar="TEXT", default=argparse.SUPPRESS, help="the same; TEXT may begin with '-'"
    )  # main.py has taken it out
    parser.add_argument("--image", type=Path, help="picture to start from (image-to-image)")
    parser.add_argument("--mask-image", type=Path, help="mask for inpainting: white is repainted, black is kept")
    parser.add_argument("--control-image", type=Path, help="picture for a ControlNet or a T2I-Adapter of the bundle")
    parser.add_argument("--canny", metavar="LOW,HIGH", help="use the edges of that picture, such as 100,200")
    parser.add_argument("--controlnet", metavar="NAME", help="which ControlNet, if the bundle has several")
    parser.add_argument("--t2i-adapter", metavar="NAME", help="which T2I-Adapter, likewise")
    for option in NUMBERS_OF_CONTROL:
        parser.add_argument(f"--{option.replace('_', '-')}", type=float, help="as in diffusers")
    parser.add_argument("--strength", type=float, help="0 to 1; a larger value changes the picture more")
    parser.add_argument(NEGATIVE_PROMPT, metavar="TEXT", help="what not to draw, if there is guidance")
    parser.add_argument("--guidance-scale", type=float, help="above 1: with guidance (default: the bundle's)")
    parser.add_argument("--size", metavar="WxH", help="in pixels, one that the bundle is built for")
    parser.add_argument("--seed", type=int, default=0, help="0 to 2^64-1 (default 0)")
    parser.add_argument("--steps", type=int, help="step count (default: the fewest that make a step)")
    adapter.add_lora(parser, "LoRA to draw with, and its weight (default 1); may be given several times")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"), help="picture file (default out.png)")


def generate(arguments: argparse.Namespace, machine: Mapping[str, Any]) -> None:
    """Draw one picture and write it; `machine`: the arguments of `Pipeline.load` for chain, engine and device."""
    path: Path = arguments.output
    _check_writable(path)
    pictures = {name: getattr(arguments, name) for name in ("image", "mask_image", "control_image")}
    given: dict[str, Any] = {name: open_picture(path) for name, path in pictures.items() if path is not None}
    if arguments.size is not None:
        width, height = console.size_of(arguments.size)
        given |= {"width": width, "height": height}
    loras = adapter.chosen(arguments.lora)
    bundle = Bundle.open(arguments.bundle, trust_engines=arguments.trust_engines)
    chain = chain_of(bundle, **given) if arguments.chain is None else arguments.chain
    with Pipeline.load(bundle, **{**machine, "chain": chain}) as pipe:
        adapter.load_all(pipe, loras)
        if arguments.canny is not None:
            given["control_image"] = _edges(arguments.canny, given, pipe.bundle.open_chain(chain).size)
        out = pipe(
            arguments.prompt,
            chain=chain,
            strength=arguments.strength,
            negative_prompt=arguments.negative_prompt,
            guidance_scale=arguments.guidance_scale,
            num_inference_steps=arguments.steps,
            seed=arguments.seed,
            **{name: getattr(arguments, name) for name in ("controlnet", "t2i_adapter", *NUMBERS_OF_CONTROL)},
            **given,
        )
    write_atomically(path, _encoded(path, out.images[0]))
    if out.resized is not None:
        height, width = out.resized
        file, drawn = arguments.image or arguments.control_image, "x".join(map(str, out.images[0].size))
        print(f"{file}: {width}x{height}, drawn as {drawn}", file=sys.stderr)
    print(path)


def _edges(thresholds: str, given: Mapping[str, Any], size: tuple[int, int]) -> "np.ndarray":
    """Return the edges of the control image at the size that is drawn; InputError for other than two thresholds."""
    try:
        low, high = map(float, thresholds.split(","))
    except ValueError:
        raise InputError(f"--canny {thresholds!r}: two thresholds were expected, such as 100,200") from None
    if "control_image" not in given:
        raise InputError("--canny finds the edges of a control image, and none was given: add --control-image FILE")
    return canny(pixels("control_image", given["control_image"], size)[0], low, high)


def _encoded(path: Path, picture: "Image.Image") -> bytes:
    """Return a picture in the format that the path's ending names; InputError if PIL cannot write it."""
    from PIL import Image

    known = {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise InputError(f"cannot write {path}: the ending {path.suffix!r} names no picture format; try .png")
    file = io.BytesIO()
    try:
        picture.save(file, known[path.suffix.lower()])
    except (OSError, ValueError) as error:  # a format without colours, or one that PIL has only the name of
        raise InputError(f"cannot write {path}: {error}; try .png") from error
    return file.getvalue()


def _check_writable(path: Path) -> None:
    """Refuse before the model is loaded, not after the picture is made."""
    from PIL import Image

    _encoded(path, Image.new("RGB", (8, 8)))
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.path.isdir(path.parent):
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write in {path.parent}")
