"""Which frames of a camera are too like the last one to be drawn: StreamDiffusion's filter of similar images."""

import numpy as np

from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.numbers import is_number, is_whole


class Similar:
    """Decides for one frame after the other. Equal frames and an equal seed give equal decisions."""

    def __init__(self, threshold: float, most: int, seed: int) -> None:
        """Take `threshold`, the cosine similarity from 0 to below 1 above which a frame may be skipped. `most`: how
        many in a row. `seed`: that of the random numbers. Raises InputError if one is out of range."""
        if not is_number(threshold) or not 0 <= threshold < 1:
            raise InputError(
                f"similar_image_threshold={threshold!r}: a number from 0 to below 1 was expected, such as 0.98"
            )
        if not is_whole(most) or most < 0:
            raise InputError(f"max_skipped={most!r}: a whole number of at least 0 was expected")
        self.threshold, self.most = threshold, most
        self._random, self._skipped = np.random.default_rng(seed), 0
        self._last: np.ndarray | None = None

    def skips(self, frame: np.ndarray) -> bool:
        """Return whether a frame, uint8 of any shape, is left out.

        The probability grows from 0 at the threshold to 1 for a frame that is equal to the last one that entered.
        """
        if self._last is None or self._skipped >= self.most:
            return False
        value = _unit(frame)
        apart = 1 - float(value @ self._last)
        if self._random.random() >= 1 - apart / (1 - self.threshold):
            return False
        self._skipped += 1
        return True

    def forget(self) -> None:
        """Let the next frame be drawn, whatever it is like."""
        self._last = None

    def entered(self, frame: np.ndarray) -> None:
        """Compare the next frames with this one, which was drawn."""
        self._last, self._skipped = _unit(frame), 0


def _unit(frame: np.ndarray) -> np.ndarray:
    """Return the levels from −1 to 1, as diffusers reads them, as one vector of length 1 in fp32."""
    levels = frame.reshape(-1).astype(np.float32) / 127.5 - 1
    return levels / np.linalg.norm(levels)
