"""A doubling of the size with the convolution after it, as one transposed convolution."""

import numpy as np

MERGED = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
"""Which of three weights in a row read the same small pixel, one row for each of four places in a transposed kernel."""


def transposed_kernel(weight: np.ndarray) -> np.ndarray:
    """Return the kernel [I, O, 4, 4] that does at once, with stride 2 and padding 1, what two operations do.

    These are: every pixel becomes four; then a convolution with `weight` [O, I, 3, 3], stride 1 and padding 1. Of the
    nine pixels that it reads at most four differ, so four ninths of the multiplications are left. The kernel is
    MERGED · weight · MERGEDᵀ for each pair of channels, in fp32 or more: a caller rounds the sums once.
    """
    wide = weight.astype(np.promote_types(weight.dtype, np.float32), copy=False)
    return np.ascontiguousarray(MERGED @ wide.swapaxes(0, 1) @ MERGED.T)
