"""The arrays that a caller gives: pictures, masks, numbers, and latents in place of noise."""

from collections.abc import Collection, Mapping

import numpy as np

from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, Feed
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import pictures
from turbochain.runtime.inputs.arrays import Array, check_array

IMAGE, MASK = "input_image", "mask"
"""The feeds that the arguments `image` and `mask_image` give."""
ARGUMENTS = {IMAGE: "image", MASK: "mask_image"}
GIVEN = ("embeds", "image", "mask", "number")
"""The kinds of feeds that a caller gives as arrays."""
REPEATED = ("image", "mask")
"""Kinds of which a caller may give fewer than there are pictures: they are repeated as in diffusers, 1 2 1 2 …"""


def picture_feeds(
    chain: OpenChain, image: object, mask_image: object, inputs: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the feeds of the pictures that a caller gives; InputError if the chain reads one that is missing, and no
    `inputs` are given instead."""
    found = {}
    for name, given, read in ((IMAGE, image, pictures.pixels), (MASK, mask_image, pictures.mask)):
        argument = ARGUMENTS[name]
        if given is not None and name not in chain.chain.feeds:
            raise InputError(f"{argument} was given, and the chain {chain.name} reads none; leave it out")
        if given is None and name in chain.chain.feeds and not inputs:
            raise InputError(f"{argument} is missing, and the chain {chain.name} reads one; give a picture")
        if given is not None:
            found[name] = read(argument, given, chain.size)
    return found


def resized(chain: OpenChain, image: object) -> tuple[int, int] | None:
    """Return height and width of the first picture if the chain draws another size, else None."""
    given = None if image is None else pictures.size_of("image", image)
    return None if given == chain.size else given


def check_latents(chain: OpenChain, latents: object, count: int) -> Array:
    """Return unit noise [count, 4, H/8, W/8] fp32 that a caller gives; InputError if it has another form, or if the
    chain begins with an image."""
    name = chain.first_noise
    if name is None or chain.chain.task == IMAGE_TO_IMAGE:
        raise InputError(
            f"latents was given, and the chain {chain.name} begins with an image; leave it out, and give a seed"
        )
    return check_array("latents", latents, "float32", (count, *chain.tensors[name].shape[1:]))


def given_feeds(chain: OpenChain, modes: frozenset[str]) -> dict[str, Feed]:
    """Return the feeds that a caller gives in a call with these modes."""
    return {name: f for name, f in chain.read(modes).items() if f.is_ in GIVEN and f.when != "held"}


def check_inputs(
    chain: OpenChain, modes: frozenset[str], given: Mapping[str, object], count: int, rows: int
) -> tuple[tuple[str, Array], ...]:
    """Return what a caller gives for the feeds that are read in these modes, by name.

    A number has its tensor's shape, pictures [N, …]; of `REPEATED` kinds a divisor of N is enough. A feed of every
    step has [rows, …] in front.
    """
    wanted = given_feeds(chain, modes)
    if wanted.keys() != given.keys():
        raise InputError(
            f"inputs: the chain {chain.name} takes {', '.join(wanted) or 'none'}; given: {', '.join(given) or 'none'}"
        )
    found = []
    for name, feed in wanted.items():
        tensor, value = chain.tensors[name], given[name]
        shape = tensor.shape if feed.is_ == "number" else (count, *tensor.shape[1:])
        if feed.is_ in REPEATED and feed.when == "call" and isinstance(value, np.ndarray) and value.ndim and len(value):
            if count % len(value):
                raise InputError(
                    f"{ARGUMENTS.get(name, name)} has {len(value)}, and {count} are drawn: give one, one for each, or "
                    f"a number that divides {count}"
                )
            shape = (len(value), *shape[1:])
        shape = (rows, *shape) if feed.when == "step" else shape
        found.append((name, check_array(f"inputs[{name!r}]", value, tensor.dtype, shape)))
    return tuple(found)
