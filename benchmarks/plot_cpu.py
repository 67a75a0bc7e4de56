"""Five panels of a results file of benchmarks/cpu.py: contenders, stages and their floors, cold start, steps, batches.

python benchmarks/plot_cpu.py benchmarks/results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import cpu_text

OURS, PEER = "tab:green", "tab:gray"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write `path` (PNG)."""
    shown = [[_contenders, _stages], [_contenders, _cold], [_steps, _batches]]
    figure, panels = pyplot.subplot_mosaic(shown, figsize=(12, 11), layout="constrained")
    for show, panel in panels.items():
        show(panel, result)
    machine = result["machine"]
    figure.suptitle(
        f"{result['what']}; {machine['cores']} cores of {machine['cpu']}, {result['date'][:10]}", fontsize=10
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _contenders(panel: Any, result: dict[str, Any]) -> None:
    """A bar for each contender: the median, and from the least to the 90th percentile; hatched: a wrong picture."""
    rows: dict[str, tuple[dict[str, Any], str]] = {}
    for pair in (pair for pair in result["pairs"] if "of" in pair):
        for side, colour in (("ours", OURS), ("peer", PEER)):
            rows.setdefault(pair[side], (pair["of"][side], colour))
    for y, (of, colour) in enumerate(rows.values()):
        median = of["median_seconds"]
        spread = [[median - of["least_seconds"]], [of["p90_seconds"] - median]]
        passed = of["against_fp32"]["passed"]
        panel.barh(y, median, xerr=spread, color=colour, capsize=2, hatch="" if passed else "//", edgecolor="white")
        said = f"  {median:.2f}" + ("" if passed else ", wrong picture")
        panel.text(of["p90_seconds"], y, said, va="center", fontsize=8)
    _name(panel, list(rows), 0.12, "seconds, prompt to picture (median; least to p90)")


def _stages(panel: Any, result: dict[str, Any]) -> None:
    """A bar for each stage of ours, with its floor as a black line on it."""
    rows = cpu_text.stages(result)
    for y, (_, _, seconds, floor, over) in enumerate(rows):
        panel.barh(y, seconds, color=OURS)
        panel.plot([floor] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        panel.text(max(seconds, floor), y, f"  {seconds:.2f}, {over:.1f}× floor", va="center", fontsize=8)
    _name(panel, [f"{ours}: {stage}" for ours, stage, *_ in rows], 0.3, "seconds of a launch; black: the floor")


def _cold(panel: Any, result: dict[str, Any]) -> None:
    """A bar for each cold start: loading, the first picture, and the rest."""
    rows: dict[str, dict[str, float]] = {}
    for of in (of for of in result["cold"] if not of["reason"]):
        for name, taken in of["seconds"].items():
            rows.setdefault(name, taken)
    parts = (("load", "tab:blue"), ("picture", "tab:orange"), ("rest", "lightgray"))
    for y, taken in enumerate(rows.values()):
        left, rest = 0.0, taken["whole"] - taken["load"] - taken["picture"]
        for part, colour in parts:
            width = taken.get(part, rest)
            panel.barh(y, width, left=left, color=colour, label=None if y else part)
            left += width
        panel.text(left, y, f"  {taken['whole']:.1f}", va="center", fontsize=8)
    _name(panel, list(rows), 0.25, "seconds from the start of a process to a picture on disk")
    _legend(panel)


def _steps(panel: Any, result: dict[str, Any]) -> None:
    _lines(panel, result["steps"], "steps", "seconds")


def _batches(panel: Any, result: dict[str, Any]) -> None:
    _lines(panel, result["batches"], "pictures in a batch", "seconds for each picture")


def _lines(panel: Any, found: list[dict[str, Any]], x: str, y: str) -> None:
    """A line for each engine of ours: how its seconds grow."""
    for of in found:
        panel.plot([int(n) for n in of["seconds"]], list(of["seconds"].values()), marker="o", label=of["ours"])
    _label(panel, x, y)
    _legend(panel)


def _name(panel: Any, names: list[str], room: float, x: str) -> None:
    """Name the bars, the first on top; `room` beside the longest is for what is written there."""
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=room)
    _label(panel, x, "")


def _label(panel: Any, x: str, y: str) -> None:
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.set_xlim(left=0)
    if y:
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])


def _legend(panel: Any) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", fontsize=8)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
