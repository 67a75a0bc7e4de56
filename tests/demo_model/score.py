"""Judge whether a picture shows what its prompt says, by masks of colour and shape; no neural network takes part."""

import itertools

import numpy as np
import scenes
from numpy.typing import NDArray
from skimage.measure import label

LIKENESS = 0.75
"""How much an object's mask must overlap the drawn shape, as intersection over union."""
STRAY = 0.03
"""The share of a picture that may have a colour that nobody named (soft edges have)."""
NEAR = 12
"""How far an object's centre may be from where it was drawn, in pixels; left to the noise, it wanders by 160."""
_APART = 64  # pixels between two centres, for a relation to hold

Mask = NDArray[np.bool_]


def faults(picture: NDArray[np.uint8], scene: scenes.Scene) -> list[str]:
    """What is wrong in a picture (512, 512, 3) of `scene`, one sentence each; empty where it is all right.

    Every pixel counts as the nearest colour of the palette. An object is the largest connected region of its
    colour; its shape and size are those of the drawn mask, of the twelve there are, that overlaps it most.
    """
    colours = nearest(picture)
    found = []
    masks = [largest(colours == thing.colour) for thing in scene.things]
    for thing, mask in zip(scene.things, masks, strict=True):
        if not mask.any():
            found.append(f"nothing is {thing.colour}")
            continue
        likeness, size, shape = looks_like(mask)
        if likeness < LIKENESS:
            found.append(f"{thing} is of no clear shape (a {size} {shape} by {likeness:.2f})")
        elif (size, shape) != (thing.size, thing.shape):
            found.append(f"{thing} is a {size} {shape}")
    if scene.relation and all(mask.any() for mask in masks):
        (x, y), (other_x, other_y) = map(centre, masks)
        towards = scenes.RELATIONS[scene.relation]
        if (x - other_x) * towards[0] + (y - other_y) * towards[1] < _APART:
            found.append(f"{scene.things[0]} is not {scene.relation} {scene.things[1]}")
    rest = colours[~np.logical_or.reduce(masks)]
    stray = np.count_nonzero(rest != scene.background) / colours.size
    if stray > STRAY:
        found.append(f"{stray:.0%} of the picture is neither an object nor {scene.background}")
    return found


def misplaced(picture: NDArray[np.uint8], scene: scenes.Scene, at: list[tuple[float, float]]) -> list[str]:
    """Which objects of a picture (512, 512, 3) are not where they were drawn, one sentence each.

    `at`: the centres (x, y) of `scenes.centres`, in pixels. An object that is missing is not told again.
    """
    colours = nearest(picture)
    found = []
    for thing, (x, y) in zip(scene.things, at, strict=True):
        mask = largest(colours == thing.colour)
        if mask.any() and (away := float(np.hypot(*np.subtract(centre(mask), (x, y))))) > NEAR:
            found.append(f"{thing} is {away:.0f} pixels away")
    return found


def nearest(picture: NDArray[np.uint8]) -> NDArray[np.str_]:
    """The name of the palette's colour that is nearest in RGB, for every pixel."""
    palette = np.float32(list(scenes.COLOURS.values()))
    away = [np.square(picture - colour).sum(-1) for colour in palette]
    return np.array(list(scenes.COLOURS))[np.argmin(away, axis=0)]


def largest(mask: Mask) -> Mask:
    """The largest connected region."""
    regions = label(mask, connectivity=1)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0  # what is not in the mask
    return regions == sizes.argmax() if sizes.any() else mask


def centre(mask: Mask) -> tuple[float, float]:
    """A mask's centre of gravity (x, y), in pixels."""
    y, x = np.nonzero(mask)
    return float(x.mean()) + 0.5, float(y.mean()) + 0.5


def looks_like(mask: Mask) -> tuple[float, str, str]:
    """(intersection over union, size, shape) of the drawn mask that is most like this one."""
    at, kinds = centre(mask), itertools.product(scenes.DIAMETERS.items(), scenes.SHAPES)
    drawn = ((size, shape, scenes.coverage(shape, diameter, at) > 0.5) for (size, diameter), shape in kinds)
    return max((_overlap(mask, template), size, shape) for size, shape, template in drawn)


def _overlap(a: Mask, b: Mask) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)
