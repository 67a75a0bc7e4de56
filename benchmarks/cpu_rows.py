"""What benchmarks/cpu.py keeps of its measurements."""

from typing import Any

import numpy as np

from turbochain.runtime.checks import metrics
from turbochain.runtime.checks.bounds import AT_LEAST, BOUNDS


def check(pictures: np.ndarray, references: np.ndarray, precision: str) -> dict[str, Any]:
    """How far pictures are from eager fp32's, and whether that is within the bounds of a picture in a precision."""
    bound = BOUNDS[precision]["image"]
    found: dict[str, Any] = {metric: getattr(metrics, metric)(pictures, references) for metric in ("psnr", *bound)}
    passed = all(found[m] >= b if m in AT_LEAST else found[m] <= b for m, b in bound.items())
    levels = np.abs(pictures.astype(int) - references)
    return {**found, "mean_abs": float(levels.mean()), "max_abs": int(levels.max()), "passed": bool(passed)}


def summary(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """What a pair's results say beside its names: the ratios, and a row for each; as `Bench.pair` has them."""
    seconds = [np.array([drawn["seconds"] for drawn in row["drawn"]]) for row in (ours, peer)]
    ratios = seconds[1] / seconds[0]
    return {
        "ratio": spread(ratios),
        "of": {name: _row(row, s) for name, row, s in zip(("ours", "peer"), (ours, peer), seconds, strict=True)},
    }


def spread(ratios: np.ndarray) -> dict[str, float]:
    """Their median and extremes."""
    return {"median": float(np.median(ratios)), "least": ratios.min(), "most": ratios.max(), "n": len(ratios)}


def _row(row: dict[str, Any], seconds: np.ndarray) -> dict[str, Any]:
    last = row["drawn"][-1]
    stages = {name: [s for drawn in row["drawn"] for s in drawn["stages"][name]] for name in last["stages"]}
    return {
        "median_seconds": float(np.median(seconds)),
        "p90_seconds": float(np.percentile(seconds, 90)),
        "least_seconds": float(seconds.min()),
        "stages": {name: float(np.median(of)) for name, of in stages.items()},
        "load_seconds": row["loaded"]["load_seconds"],
        "first_picture_seconds": row["first"]["seconds"],
        "peak_rss_bytes": last["peak_rss_bytes"],
        "rss_anon_bytes": last["rss_anon_bytes"],
        "versions": row["loaded"]["versions"],
        "against_fp32": row["checks"],
    }
