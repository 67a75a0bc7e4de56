"""Which values count as a number of a caller's: Python's and numpy's alike, and no bool."""

from typing import TypeGuard

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
"""The largest number that graphs can be fed."""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an integer or a float."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
