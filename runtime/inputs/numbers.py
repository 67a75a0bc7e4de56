"""Numbers that callers give: as values, which may be Python's or numpy's but no bool, or in a text, NAME:NUMBER."""

import math
import os
from typing import TypeGuard

import numpy as np

from turbochain.runtime.errors import InputError

LARGEST = float(np.finfo(np.float32).max)
"""The largest number that graphs can be fed."""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an integer or a float."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def weighted(option: str, text: str) -> tuple[str, float]:
    """Return the name and the number of NAME[:NUMBER], without one 1; InputError if it is not finite.

    The name of a file that exists may have a colon of its own.
    """
    name, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{option} {text}: a number was expected after the colon, such as {name}:0.8")
    return name, value
