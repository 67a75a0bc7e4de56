"""Draw a results file: contenders, stages and floors, cold starts, growth with the steps, batches.

python benchmarks/plot.py benchmarks/results/NAME.json
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import contenders
import result
import tables
from result import Result
from rows import Figures

OURS, PEER = "tab:green", "tab:gray"
BAR = 0.3  # inches


def draw(results: Result, path: Path) -> None:
    """Write `path` (PNG): a panel for each shape of pairs, and one for each other measurement that was made."""
    panels: list[tuple[int, Callable[[Any], None]]] = []  # bars, how to draw
    shapes: dict[tuple[int, int], dict[str, Figures]] = {}
    for pair in results.pairs:
        for name, of in ((pair.ours, pair.our_figures), (pair.peer, pair.peer_figures)):
            if of:
                shapes.setdefault((pair.batch, pair.steps), {}).setdefault(name, of)
    for shape, contestants in shapes.items():
        panels.append((len(contestants), lambda p, s=shape, c=contestants: _contenders(p, results, s, c)))
    if stages := tables.stages(results):
        panels.append((len(stages), lambda p: _stages(p, results, stages)))
    if cold := {name: of for row in results.cold for name, of in row.seconds.items()}:
        panels.append((len(cold), lambda p: _cold(p, cold)))
    if results.growth:
        panels.append((8, lambda p: _lines(p, {r.ours: r.seconds for r in results.growth}, "steps", "seconds")))
    if any(row.ratio for row in results.batches):
        x, y = "pictures in a batch", "seconds per picture"
        panels.append((8, lambda p: _lines(p, {r.ours: r.seconds for r in results.batches}, x, y)))
    if panels:
        _write(results, panels, path)


def _write(results: Result, panels: Sequence[tuple[int, Callable[[Any], None]]], path: Path) -> None:
    heights = [1 + BAR * bars for bars, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(10, sum(heights) + 0.5), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (_, show) in zip(axes[:, 0], panels, strict=True):
        show(axis)
    run = results.runs[-1]
    dates = sorted({r.date[:10] for r in results.runs if r.date})
    name = f"{results.source}, {results.width}x{results.height}"
    figure.suptitle(f"{name}; {tables.host(run)}, {', '.join(dates)}", fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _contenders(panel: Any, results: Result, shape: tuple[int, int], contestants: Mapping[str, Figures]) -> None:
    """A bar for each contender, from the least to p90; hatched: a wrong picture; black: the floor of that precision."""
    batch, steps = shape
    floors = {f.precision: f.ms for f in results.floors if (f.batch, f.steps) == shape}
    scale, unit = (1.0, "seconds") if results.device == "cpu" else (1e3, "ms")
    for y, (name, of) in enumerate(contestants.items()):
        contender = contenders.find(name)
        median, passed = scale * of.median_seconds, of.against_fp32.passed
        spread = [[median - scale * of.least_seconds], [scale * of.p90_seconds - median]]
        colour, hatch = OURS if contender.ours else PEER, "" if passed else "//"
        panel.barh(y, median, xerr=spread, color=colour, capsize=2, hatch=hatch, edgecolor="white")
        if contender.precision in floors:
            floor = 1e-3 * scale * floors[contender.precision]
            panel.plot([floor] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        said = f"  {tables.number(median)}" + ("" if passed else ", wrong picture")
        panel.text(max(scale * of.p90_seconds, median), y, said, va="center", fontsize=8)
    _name(panel, list(contestants), f"{unit}, prompt to picture (median; least to p90); black: the floor")
    panel.set_title(f"batch {batch}, {steps} step{'s' * (steps > 1)}", fontsize=9, loc="left")


def _stages(panel: Any, results: Result, rows: Sequence[tuple[str, str, float, float]]) -> None:
    """A bar for each stage of ours, with its floor as a black line on it."""
    scale, unit = (1.0, "seconds") if results.device == "cpu" else (1e3, "ms")
    for y, (_, _, seconds, floor) in enumerate(rows):
        panel.barh(y, scale * seconds, color=OURS)
        panel.plot([scale * floor] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        said = f"  {tables.number(scale * seconds)}, {seconds / floor:.1f}× floor"
        panel.text(scale * max(seconds, floor), y, said, va="center", fontsize=8)
    _name(panel, [f"{ours}: {stage}" for ours, stage, *_ in rows], f"{unit} of one launch; black: the floor")


def _cold(panel: Any, contestants: Mapping[str, Any]) -> None:
    """A bar for each cold start: loading, the first picture, and the rest."""
    for y, taken in enumerate(contestants.values()):
        parts = {"load": taken.load, "picture": taken.picture, "rest": taken.whole - taken.load - taken.picture}
        left = 0.0
        for (part, width), colour in zip(parts.items(), ("tab:blue", "tab:orange", "lightgray"), strict=True):
            panel.barh(y, width, left=left, color=colour, label=None if y else part)
            left += width
        panel.text(left, y, f"  {taken.whole:.1f}", va="center", fontsize=8)
    _name(panel, list(contestants), "seconds from the start of a process to a picture on disk")
    panel.legend(fontsize=8)


def _lines(panel: Any, found: Mapping[str, Mapping[str, float]], x: str, y: str) -> None:
    """A line for each of ours: how its seconds grow."""
    for name, seconds in found.items():
        panel.plot([int(n) for n in seconds], list(seconds.values()), marker="o", label=name)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.legend(fontsize=8)


def _name(panel: Any, names: Sequence[str], x: str) -> None:
    """Name the bars, the first on top, with room beside the longest for its text."""
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set_xlim(left=0)
    panel.set_xlabel(x, fontsize=8)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(result.read(source), source.with_suffix(".png"))
