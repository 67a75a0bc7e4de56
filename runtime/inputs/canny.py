"""Find the edges of a picture, as ControlNets for edges expect them: Canny's method, with OpenCV's results."""

import math

import numpy as np

from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.pictures import levels

_TAN_22 = 13573
"""The tangent of 22.5 degrees times 2¹⁵, as OpenCV rounds it."""
_BEYOND = 4 * 255 * 2
"""No gradient's magnitude is larger."""


def canny(image: object, low: float, high: float) -> np.ndarray:
    """Return the edges of a picture as uint8 [H, W]: 255 on an edge, 0 elsewhere.

    Equal to `cv2.Canny(image, low, high)` in every pixel. `image`: a PIL image, or an array [H, W], [H, W, 3] or
    [H, W, 4] as in `inputs.pictures`; a PIL image of a grey mode is taken as [H, W], any other as RGB. In a picture
    with colours each pixel has the gradient of the channel in which it is steepest (of equal ones, the first): that is
    not what its grey picture would give. `low`, `high`: thresholds, 0 to 2040, of |horizontal| + |vertical| gradient
    by Sobel's 3x3 filters; they may be swapped. A line is kept if it is above `low` everywhere and above `high`
    somewhere.

    A call takes the result as it is (`control_image=canny(picture, 100, 200)`). What wants three equal channels gets
    them from `PIL.Image.fromarray(edges).convert("RGB")`. Raises InputError if `image` is no picture or a threshold no
    number.
    """
    low, high = sorted((_threshold("low", low), _threshold("high", high)))
    picture = levels("image", image)
    height, width = picture.shape[:2]
    across, down = _sobel(np.moveaxis(picture, -1, 0) if picture.ndim == 3 else picture[None])
    steepness = np.abs(across) + np.abs(down)
    magnitude = np.zeros((height + 2, width + 2), np.int16)  # nothing is steep beyond the border
    magnitude[1:-1, 1:-1] = steepness.max(0)
    rows, columns = np.nonzero(magnitude[1:-1, 1:-1] > low)
    channels = steepness[:, rows, columns].argmax(0)
    at = (rows + 1) * (width + 2) + columns + 1  # index in the flat magnitude
    flat = magnitude.ravel()
    is_ridge = _is_ridge(flat, at, width + 2, across[channels, rows, columns], down[channels, rows, columns])
    ridge = at[is_ridge]
    edges = np.zeros_like(magnitude, np.uint8)
    edges.ravel()[ridge[_kept(ridge, flat[ridge] > high, width + 2, flat.size)]] = 255
    return edges[1:-1, 1:-1].copy()


def _threshold(argument: str, value: float) -> int:
    """Return a threshold as OpenCV reads it, rounded down. Raises InputError."""
    try:
        if not math.isnan(value):
            return math.floor(min(max(value, -1.0), _BEYOND))
    except TypeError:
        pass
    raise InputError(f"{argument}={value!r}: a number from 0 to {_BEYOND} was expected, such as 100")


def _sobel(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients to the right and downwards, int16 [C, H, W]; beyond the border its pixels are repeated."""
    padded = np.pad(picture.astype(np.int16), ((0, 0), (1, 1), (1, 1)), "edge")
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = smooth[..., 2:] - smooth[..., :-2]
    difference = padded[:, 2:] - padded[:, :-2]
    down = difference[..., :-2] + 2 * difference[..., 1:-1] + difference[..., 2:]
    return across, down


def _is_ridge(flat: np.ndarray, at: np.ndarray, width: int, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return for each place whether no neighbour along its gradient is steeper, bool [n].

    `flat`: the magnitudes, `width` to a row; `across`, `down`: the gradients of the places. Of equal neighbours that
    to the left or above is the ridge; on a diagonal neither is, as in OpenCV.
    """
    x, y = np.abs(across).astype(np.int32), np.abs(down).astype(np.int32) << 15
    level = y < x * _TAN_22
    upright = y > x * _TAN_22 + (x << 16)
    diagonal = ~(level | upright)
    slope = np.where((across < 0) != (down < 0), -1, 1)
    back = np.where(level, 1, np.where(upright, width, width + slope))
    own, before, after = flat[at], flat[at - back], flat[at + back]
    return (own > before) & np.where(diagonal, own > after, own >= after)


def _kept(at: np.ndarray, strong: np.ndarray, width: int, size: int) -> np.ndarray:
    """Return for each place whether its line has a strong one, bool [n]; places that touch, even at a corner, are one
    line.

    `at`: indices in a flat picture of `size` pixels, `width` to a row, whose border holds none.
    """
    number = np.full(size, -1, np.int32)
    number[at] = np.arange(len(at), dtype=np.int32)
    ones, others = [], []
    for step in (1, width - 1, width, width + 1):
        neighbours = number[at + step]
        (found,) = np.nonzero(neighbours >= 0)
        ones.append(found)
        others.append(neighbours[found])
    line = _lines(len(at), np.concatenate(ones), np.concatenate(others))
    has_strong = np.zeros(len(at), bool)
    has_strong[line[strong]] = True
    return has_strong[line]


def _lines(count: int, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each of `count` places the least one that it is connected with; `ones[i]` touches `others[i]`.

    In each round every line joins the least that it touches, so that few rounds are needed, however long lines are.
    """
    line = np.arange(count)
    while len(ones):
        np.minimum.at(line, np.maximum(ones, others), np.minimum(ones, others))
        while (further := line[line]).tobytes() != line.tobytes():
            line = further
        ones, others = line[ones], line[others]
        apart = ones != others
        ones, others = ones[apart], others[apart]
    return line
