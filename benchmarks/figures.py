"""Turn samples into the figures of a row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np

from rows import Check, Figures, Spread
from turbochain.runtime.checks import metrics
from turbochain.runtime.checks.bounds import AT_LEAST, BOUNDS
from workload import Workload

FEWEST_FOR_P99 = 20  # rounds
PROBABILITY = 0.9
"""How probable it is that a median's interval holds it."""
WIDTH = 0.05
"""How far the interval's ends may be from the median, as a share of it, if the median is settled."""


@dataclass
class Samples:
    """The answers of one contender of a pair."""

    loaded: dict[str, Any]
    first: dict[str, Any]
    check: Check
    drawn: list[dict[str, Any]] = field(default_factory=list)  # one of each round

    @property
    def seconds(self) -> np.ndarray:
        """Return the seconds of each round."""
        return np.array([drawn["seconds"] for drawn in self.drawn])

    def figures(self) -> Figures:
        """Return their statistics."""
        last, seconds = self.drawn[-1], self.seconds
        stages = {name: [s for drawn in self.drawn for s in drawn["stages"][name]] for name in last["stages"]}
        gpu = [drawn["gpu_seconds"] for drawn in self.drawn if drawn["gpu_seconds"] is not None]
        return Figures(
            median_seconds=float(np.median(seconds)),
            p90_seconds=float(np.percentile(seconds, 90)),
            p99_seconds=float(np.percentile(seconds, 99)) if len(seconds) >= FEWEST_FOR_P99 else None,
            least_seconds=float(seconds.min()),
            gpu_seconds=float(np.median(gpu)) if gpu else None,
            stages={name: float(np.median(of)) for name, of in stages.items()},
            load_seconds=self.loaded["load_seconds"],
            first_picture_seconds=self.first["seconds"],
            peak_rss_bytes=last["peak_rss_bytes"],
            rss_anon_bytes=last["rss_anon_bytes"],
            gpu_memory_bytes=self.first["gpu_memory_bytes"],
            precision=self.loaded["precision"],
            remark=last["remark"],
            versions=self.loaded["versions"],
            against_fp32=self.check,
        )


def spread(ratios: Sequence[float] | np.ndarray) -> Spread:
    """Return the median, the extremes, and the interval of the median."""
    low, high = interval(ratios) or (None, None)
    return Spread(float(np.median(ratios)), float(np.min(ratios)), float(np.max(ratios)), len(ratios), low, high)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Return the narrowest interval between two values, as many from the one end as from the other, that holds the
    median with `PROBABILITY`; None if there are too few values.

    The number of values below the median is binomial: Conover, Practical Nonparametric Statistics, 3.2.
    """
    ordered, n = np.sort(values), len(values)
    outside, found = 0.0, None
    for k in range(n // 2):
        outside += 2 * comb(n, k) / 2**n
        if 1 - outside < PROBABILITY:
            break
        found = float(ordered[k]), float(ordered[n - 1 - k])
    return found


def is_narrow(found: Spread) -> bool:
    """Return whether the interval of the median is known, and within `WIDTH` of the median on both sides."""
    return found.low is not None and found.high is not None and width(found) <= WIDTH


def width(found: Spread) -> float:
    """Return how far the interval's farther end is from the median, as a share of it."""
    assert found.low is not None and found.high is not None
    return max(found.median - found.low, found.high - found.median) / found.median


def check(pictures: np.ndarray, references: np.ndarray, precision: str, truncated: bool = False) -> Check:
    """Compare pictures [B, H, W, 3] uint8 with eager fp32's, by the bounds of `precision`.

    Of pictures that were `truncated` to levels any share of the values may differ by as many levels as is allowed.
    """
    bound = {m: b for m, b in BOUNDS[precision]["image"].items() if not (truncated and m == "fraction_differing")}
    found: dict[str, float] = {metric: getattr(metrics, metric)(pictures, references) for metric in bound}
    levels = np.abs(pictures.astype(int) - references)
    return Check(
        passed=all(found[m] >= b if m in AT_LEAST else found[m] <= b for m, b in bound.items()),
        psnr=metrics.psnr(pictures, references),
        mean_abs=float(levels.mean()),
        max_abs=int(levels.max()),
        ssim=found.get("ssim"),
        fraction_differing=found.get("fraction_differing"),
    )


def is_short(workload: Workload, steps: int) -> bool:
    """Return whether a whole picture has bounds of its own: up to 4 steps, without guidance."""
    return steps <= 4 and not workload.guidance_scale


def is_as_good(ours: Check, peer: Check) -> bool:
    """Return whether our error is at most 1.25 times that of diffusers in the same precision: the bound of a long
    call, in which errors add up."""
    return ours.psnr >= peer.psnr - 20 * np.log10(1.25) or ours.passed


def differs(ours: str, peer: str, precisions: Sequence[dict[str, str]]) -> str | None:
    """Return how two contenders' precisions differ: as a whole, or else by role in some stages; None if they do not."""
    if ours != peer:
        return f"{ours} against {peer}"
    mine, theirs = precisions
    other = (role for role in mine if theirs.get(role, mine[role]) != mine[role])
    return "; ".join(f"{role} in {mine[role]}, the peer's in {theirs[role]}" for role in other) or None
