"""Arrays that a caller gives: checked, copied, and compared by their values."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from turbochain.runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class Array:
    """An array that is compared and hashed by its values, so that a request can be."""

    value: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.value.dtype.str, self.value.shape, self.value.tobytes()


def check_array(argument: str, value: object, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return a copy of a caller's array; `argument` names it in the messages. Raises InputError if it is another."""
    expected = f"an array of {dtype} {list(shape)} was expected"
    if not isinstance(value, np.ndarray):
        mend = "; for a torch tensor, give tensor.detach().float().cpu().numpy()"
        torch = mend if type(value).__module__.startswith("torch") else ""
        raise InputError(f"{argument} is of type {type(value).__name__}: {expected}{torch}")
    if value.dtype != dtype or value.shape != shape:
        raise InputError(f"{argument} is {value.dtype} {list(value.shape)}: {expected}")
    if not np.isfinite(value).all():
        raise InputError(f"{argument} holds NaN or infinite values")
    kept = value.copy()  # the caller may change its own while the request waits
    kept.setflags(write=False)
    return Array(kept)
