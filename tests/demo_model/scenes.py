"""The demo model's world: a small grammar of prompts, where the noise puts what they name, and the pictures.

    a large red circle left of a small blue square on a yellow background

A scene holds one object, or two and a relation, on a plain background. One in four of the combinations
(size, colour, shape, background) is held out: no training picture shows it, alone or in a pair.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

PIXELS = 512
COLOURS = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 60),
    "green": (30, 160, 70),
    "blue": (40, 80, 220),
    "purple": (140, 50, 160),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
DIAMETERS = {"small": 88, "": 128, "large": 176}
"""Size word (none is the middle one) → diameter of a circle in pixels; other shapes are about as large."""
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation → the direction from the second object to the first."""

# Sides, distance from the centre to a side's line in diameters, angle of the first side's normal.
_POLYGONS = {"square": (4, 0.44, 0.0), "triangle": (3, 0.32, -pi / 2), "star": (5, 0.18, pi / 10)}
SQUASH = 0.8  # tanh of so many times a normal number is close to uniform
_APART = 216  # between two objects' centres, along their relation, in pixels: two large ones never touch
_WANDER = 80  # how far the noise moves a centre at most, in pixels


@dataclass(frozen=True)
class Thing:
    """One object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What a prompt says. `relation` is empty where there is one object."""

    things: tuple[Thing, ...]
    relation: str
    background: str

    def __str__(self) -> str:
        ground = f"{'an' if self.background[0] in 'aeiou' else 'a'} {self.background} background"
        return f"{f' {self.relation} '.join(map(str, self.things))} on {ground}"

    @property
    def held_out(self) -> bool:
        """Whether it shows a combination that no training picture shows."""
        return any(zlib.crc32(f"{thing} on {self.background}".encode()) % 4 == 0 for thing in self.things)


def alone() -> Iterator[Scene]:
    """Every scene with one object (672)."""
    for size, colour, shape, background in itertools.product(DIAMETERS, COLOURS, SHAPES, COLOURS):
        if colour != background:
            yield Scene((Thing(size, colour, shape),), "", background)


def pair(random: np.random.Generator) -> Scene:
    """A scene with two objects; these and the background have three colours."""
    colours = random.permutation(list(COLOURS))
    things = tuple(Thing(str(random.choice(list(DIAMETERS))), str(c), str(random.choice(SHAPES))) for c in colours[:2])
    return Scene(things, str(random.choice(list(RELATIONS))), str(colours[2]))


_TRAINED_ALONE = [scene for scene in alone() if not scene.held_out]


def training_scene(random: np.random.Generator) -> Scene:
    """A scene that is not held out: two in five with one object."""
    if random.random() < 0.4:
        return _TRAINED_ALONE[random.integers(len(_TRAINED_ALONE))]
    return next(scene for scene in iter(lambda: pair(random), None) if not scene.held_out)


def held_out(single: int, double: int, seed: int = 0) -> list[Scene]:
    """So many different held-out scenes with one object, then so many with two."""
    random = np.random.default_rng(seed)
    singles = [scene for scene in alone() if scene.held_out]
    chosen = [singles[i] for i in random.permutation(len(singles))[:single]]
    doubles = (scene for scene in iter(lambda: pair(random), None) if scene.held_out)
    unique = dict.fromkeys(itertools.islice(doubles, 2 * double))
    return chosen + list(unique)[:double]


def place(noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the starting noise (…, 4, h, w), standard normal, puts the objects: (…, 2) numbers, also N(0, 1).

    They are the sums of its first two channels, with the signs of a chessboard, scaled to unit variance. Of a picture
    that is half drawn such a sum is near zero, so at every step it is still the noise's: plain means of `place` and of
    the picture would be one number.
    """
    h, w = noise.shape[-2:]
    return (noise[..., :2, :, :] * signs(h, w)).sum((-2, -1)) / np.float32(sqrt(h * w))


def signs(h: int, w: int) -> NDArray[np.float32]:
    """A chessboard of 1 and -1, (h, w)."""
    return 1 - 2 * (np.indices((h, w)).sum(0) % 2).astype(np.float32)


def centres(scene: Scene, placed: NDArray[np.float32]) -> list[tuple[float, float]]:
    """The centres (x, y) of the objects in `scene`, for one `place`, in pixels of a 512×512 picture.

    A single object wanders in both directions; of two, each wanders across their relation.
    """
    wander = (PIXELS / 2 + _WANDER * np.tanh(SQUASH * placed)).tolist()
    if not scene.relation:
        return [(wander[0], wander[1])]
    x, y = RELATIONS[scene.relation]
    along = (PIXELS / 2 + side * (x + y) * _APART / 2 for side in (1, -1))
    return [(at, across) if x else (across, at) for at, across in zip(along, wander, strict=True)]


def coverage(shape: str, diameter: float, centre: tuple[float, float], pixels: int = PIXELS) -> NDArray[np.float32]:
    """How much of each pixel the shape covers, 0 to 1, (pixels, pixels), anti-aliased. All lengths in pixels."""
    covered = np.zeros((pixels, pixels), np.float32)
    rows, columns, part = _covered(shape, diameter, centre, pixels)
    covered[rows, columns] = part
    return covered


def _covered(
    shape: str, diameter: float, centre: tuple[float, float], pixels: int
) -> tuple[slice, slice, NDArray[np.float32]]:
    """The rows and columns around a shape, and how much of each pixel there it covers."""
    columns, rows = (slice(max(0, int(c - diameter)), min(pixels, int(c + diameter) + 1)) for c in centre)
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - centre[0])
    up = np.float32(centre[1] - 0.5) - np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    if shape == "circle":
        outside = np.hypot(x, up) - np.float32(diameter / 2)
    else:
        # A polygon as half planes: inside a convex one, a point is inside all; inside a star, inside all but one.
        sides, apothem, first = _POLYGONS[shape]
        angles = first + np.arange(sides, dtype=np.float32) * np.float32(2 * pi / sides)
        planes = [x * np.cos(a) + up * np.sin(a) - np.float32(apothem * diameter) for a in angles]
        outside = np.sort(planes, axis=0)[-2] if shape == "star" else np.max(planes, axis=0)
    return rows, columns, np.clip(0.5 - outside, 0, 1)


def draw(scene: Scene, placed: NDArray[np.float32], pixels: int = PIXELS) -> NDArray[np.uint8]:
    """The picture that belongs to a scene and the noise's `place`: (pixels, pixels, 3)."""
    picture = np.empty((pixels, pixels, 3), np.uint8)
    picture[:] = COLOURS[scene.background]
    scale = pixels / PIXELS
    for thing, (x, y) in zip(scene.things, centres(scene, placed), strict=True):
        rows, columns, covered = _covered(thing.shape, DIAMETERS[thing.size] * scale, (x * scale, y * scale), pixels)
        behind = picture[rows, columns]
        mixed = behind + covered[..., None] * (np.float32(COLOURS[thing.colour]) - behind)
        picture[rows, columns] = np.rint(mixed)
    return picture
