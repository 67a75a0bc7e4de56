"""The metrics of a verification against scikit-image's and PyTorch's."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from turbochain.runtime.checks import metrics


def picture(size: int, kind: str, seed: int) -> np.ndarray:
    """[2, size, size, 3] uint8: white noise, or smooth shapes with an edge and a flat area."""
    random = np.random.default_rng(seed)
    if kind == "random":
        return random.integers(0, 256, (2, size, size, 3), np.uint8)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(7 * x * (i + 1) + seed) * np.cos(5 * y + i) for i in range(6)]
    smooth = 127 + 100 * np.stack(waves, -1).reshape(size, size, 2, 3).transpose(2, 0, 1, 3)
    smooth[:, size // 3 : size // 2, : size // 2] = 255
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.5, 8, 100])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("size", [64, 128])
def test_picture_metrics_are_scikit_images(size: int, kind: str, noise: float) -> None:
    reference = picture(size, kind, 1)
    error = np.random.default_rng(2).normal(0, noise, reference.shape)
    result = (reference + error).round().clip(0, 255).astype(np.uint8)
    assert metrics.psnr(result, reference) == pytest.approx(
        peak_signal_noise_ratio(reference, result, data_range=255), rel=1e-9
    )
    each = [
        structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(reference, result, strict=True)
    ]
    assert metrics.ssim(result, reference) == pytest.approx(min(each), abs=1e-9)


def test_ssim_is_the_worst_of_the_batch() -> None:
    reference = picture(64, "smooth", 1)
    result = reference.copy()
    result[1] = picture(64, "random", 1)[1]
    worst = structural_similarity(reference[1], result[1], data_range=255, channel_axis=-1)
    assert worst < 0.5
    assert metrics.ssim(result, reference) == pytest.approx(worst, abs=1e-9)
    assert metrics.ssim(reference, reference) == pytest.approx(1)
    almost = reference.copy()
    almost[0, 0, 0, 0] ^= 1
    assert metrics.psnr(reference, reference) == pytest.approx(120)
    assert metrics.psnr(almost, reference) < metrics.psnr(reference, reference) < float("inf")  # JSON has no infinity


def test_vector_metrics_are_torchs() -> None:
    random = np.random.default_rng(3)
    reference = random.standard_normal((2, 77, 64), np.float32)
    result = reference + 0.05 * random.standard_normal(reference.shape, np.float32)
    x, y = torch.tensor(result).double(), torch.tensor(reference).double()
    assert metrics.cosine(result, reference) == pytest.approx(float(torch.cosine_similarity(x, y, dim=-1).min()))
    assert metrics.relative_l2(result, reference) == pytest.approx(float(torch.dist(x, y) / y.norm()))
    assert metrics.max_abs(result, reference) == pytest.approx(float((x - y).abs().max()))


def test_levels_do_not_wrap_around() -> None:
    low, high = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8)
    high[0, 0, 0, 0] = 255
    assert metrics.max_abs(low, high) == metrics.max_abs(high, low) == 255
    assert metrics.fraction_differing(low, high) == 1 / 12
