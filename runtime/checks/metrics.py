"""Measure how far two results are apart; each function takes (result, reference) and returns one float."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray[Any, Any]


def max_abs(result: Array, reference: Array) -> float:
    """Return the largest absolute difference; for pictures in levels of 255."""
    return float(np.abs(result.astype(np.float64) - reference).max())


def fraction_differing(result: Array, reference: Array) -> float:
    """Return the share of values that differ, 0 to 1."""
    return float(np.mean(result != reference))


def relative_l2(result: Array, reference: Array) -> float:
    """Return ‖result − reference‖₂ / ‖reference‖₂."""
    norm = np.linalg.norm(reference.astype(np.float64))
    return float(np.linalg.norm(result.astype(np.float64) - reference) / max(float(norm), 1e-30))


def cosine(result: Array, reference: Array) -> float:
    """Return the smallest cosine similarity of any vector along the last axis."""
    x, y = result.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(((x * y).sum(-1) / np.maximum(norms, 1e-30)).min())


def psnr(result: Array, reference: Array) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB: 10·log₁₀(255² / MSE), at most 120 (equal
    ones)."""
    error = float(np.mean((result.astype(np.float64) - reference) ** 2))
    return float(10 * np.log10(255.0**2 / max(error, 255.0**2 / 1e12)))


def ssim(result: Array, reference: Array) -> float:
    """Return the structural similarity of uint8 pictures [B, H, W, C], the lowest of the batch.

    Wang et al. 2004, equation 13, with 7×7 uniform windows, unbiased covariances, K₁ = 0.01, K₂ = 0.03 and
    L = 255, averaged over windows and channels (the defaults of scikit-image's structural_similarity).
    """
    return min(_ssim(x, y) for x, y in zip(result, reference, strict=True))


def _ssim(x: Array, y: Array, size: int = 7) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    unbiased = size**2 / (size**2 - 1)
    mean_x, mean_y = _window_mean(x, size), _window_mean(y, size)
    variance_x = unbiased * (_window_mean(x * x, size) - mean_x**2)
    variance_y = unbiased * (_window_mean(y * y, size) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y, size) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


def _window_mean(x: Array, size: int) -> Array:
    rows = sliding_window_view(x, size, axis=0).mean(-1)
    return sliding_window_view(rows, size, axis=1).mean(-1)


METRICS = {
    "max_abs": max_abs,
    "fraction_differing": fraction_differing,
    "relative_l2": relative_l2,
    "cosine": cosine,
    "psnr": psnr,
    "ssim": ssim,
}
"""Metric by the name that checks have for it."""
