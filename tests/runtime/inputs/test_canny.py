"""Edges, beside OpenCV's."""

import re
from typing import Any

import cv2
import numpy as np
import pytest
import scenes
import skimage.data
from PIL import Image

from turbochain.runtime import InputError
from turbochain.runtime.inputs import canny

THRESHOLDS = [(100, 200), (200, 100), (0, 0), (150, 150), (-5, 1), (99.9, 100.1), (0, 2039), (2040, 2040), (9e9, 9e9)]


def assert_equal(picture: np.ndarray, low: float, high: float) -> None:
    edges = canny(picture, low, high)
    assert edges.dtype == np.uint8 and edges.flags.c_contiguous
    right = cv2.Canny(np.ascontiguousarray(picture), min(low, 1e6), min(high, 1e6))
    np.testing.assert_array_equal(edges, right, f"{picture.shape} {low} {high}")


def made(random: np.random.Generator, kind: int) -> np.ndarray:
    """Return a picture of random size, grey or in colours: noise, soft noise, dots, steps or shapes."""
    height, width = (int(n) for n in random.integers(1, 90, 2))
    height, width = {10: (1, width), 11: (height, 1), 12: (1, 1)}.get(kind, (height, width))
    shape = (height, width, 3) if random.random() < 0.5 else (height, width)
    picture = random.integers(0, 256, shape, np.uint8)
    if kind % 5 == 1:
        soft = cv2.GaussianBlur(picture, (0, 0), 1 + 2 * random.random()).reshape(shape).astype(float)
        picture = np.clip(128 + 3 * (soft - 128), 0, 255).astype(np.uint8)
    elif kind % 5 == 2:
        picture = (picture > random.integers(1, 256)) * np.uint8(random.integers(1, 256))
    elif kind % 5 == 3:
        picture = picture // 64 * 64
    elif kind % 5 == 4:
        picture = np.zeros(shape, np.uint8)
        for _ in range(6):
            corners = random.integers(-10, 100, (3, 2)).astype(np.int32)
            colour = tuple(int(n) for n in random.integers(0, 256, 3))
            cv2.fillPoly(picture, [corners], colour if len(shape) == 3 else colour[:1])
    return picture


def test_two_hundred_pictures_have_opencvs_edges() -> None:
    random, count = np.random.default_rng(0), 0
    for i in range(200):
        picture = made(random, i % 20)
        low, high = THRESHOLDS[i % len(THRESHOLDS)] if i % 3 == 0 else random.integers(0, 700, 2)
        assert_equal(picture, float(low), float(high))
        count += bool(canny(picture, low, high).any())
    assert count > 100


@pytest.mark.parametrize("name", ["astronaut", "camera", "text"])
def test_photographs_have_opencvs_edges(name: str) -> None:
    picture = getattr(skimage.data, name)()
    for low, high in ((100, 200), (30, 60), (50, 400)):
        assert_equal(picture, low, high)
    assert canny(picture, 30, 60).mean() > 5


def test_the_demos_scenes_have_opencvs_edges() -> None:
    random = np.random.default_rng(0)
    for scene in scenes.held_out(3, 3):
        placed = scenes.place(random.standard_normal((4, 8, 8)).astype(np.float32))
        assert_equal(scenes.draw(scene, placed), 100, 200)


def test_a_line_is_followed_however_long_it_is() -> None:
    picture = np.zeros((201, 201), np.uint8)
    left, right = 2, 198
    while left < right:  # a spiral of rectangles that are joined
        picture[left, left - 2 : right] = picture[left:right, right] = picture[right, left : right + 1] = 20
        picture[left + 4 : right + 1, left] = 20
        left, right = left + 4, right - 4
    picture[2, 2] = 255
    assert_equal(picture, 10, 300)
    assert canny(picture, 10, 300).astype(bool).sum() > 1000


def test_what_is_given_may_be_any_picture() -> None:
    colours = skimage.data.astronaut()[::4, ::4]
    edges = cv2.Canny(np.ascontiguousarray(colours), 100, 200)
    opaque = np.dstack([colours, np.full(colours.shape[:2], 7, np.uint8)])
    floats = colours / np.float64(255)
    for given in (Image.fromarray(colours), opaque, Image.fromarray(opaque), floats, colours[None], [colours]):
        np.testing.assert_array_equal(canny(given, 100, 200), edges)
    grey = Image.fromarray(colours).convert("L")
    of_grey = cv2.Canny(np.asarray(grey), 100, 200)
    for given in (grey, grey.convert("LA"), np.asarray(grey), np.asarray(grey)[..., None]):
        np.testing.assert_array_equal(canny(given, 100, 200), of_grey)
    assert (edges != of_grey).any()
    turned = Image.fromarray(colours)
    turned.getexif()[0x0112] = 6  # a quarter to the right
    np.testing.assert_array_equal(canny(turned, 100, 200), cv2.Canny(np.rot90(colours, -1).copy(), 100, 200))


@pytest.mark.parametrize(
    ("image", "low", "says"),
    [
        (np.zeros((8, 8)), "1", "low='1': a number from 0 to 2040"),
        (np.zeros((8, 8)), float("nan"), "low=nan: a number from 0 to 2040"),
        (np.zeros((2, 8, 8, 3)), 1, "image holds 2 pictures: one was expected"),
        (np.zeros((0, 8)), 1, "at least one picture of one pixel"),
        ("edges.png", 1, "image is of type str"),
    ],
)
def test_what_is_no_picture_or_threshold_is_refused(image: Any, low: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        canny(image, low, 200)
