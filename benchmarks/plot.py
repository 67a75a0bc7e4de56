"""Draw a results file: contenders, stages and floors, cold starts, growth with the steps, batches.

python benchmarks/plot.py benchmarks/results/NAME.json
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    shapes: dict[str, dict[str, Figures]] = {}
    for pair in results.pairs:
        for name, of in ((pair.ours, pair.our_figures), (pair.peer, pair.peer_figures)):
            if of:
                shapes.setdefault(tables.shape(pair), {}).setdefault(name, of)
    for shape, contestants in shapes.items():
        x = f"from prompt to picture; batch, steps {shape} (median; least to p90)"
        bars = _contenders(results, shape, contestants)
        panels.append((len(bars), lambda p, b=bars, x=x: _bars(p, b, results, x)))
    if stages := tables.stages(results):
        launches = [
            Bar(f"{o}: {s}", value, f", {value / least:.1f}× floor", floor=least) for o, s, value, least in stages
        ]
        panels.append((len(launches), lambda p: _bars(p, launches, results, "of one launch")))
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


@dataclass(frozen=True)
class Bar:
    """One bar, the text beside it, and its floor."""

    name: str
    value: float
    text: str
    colour: str = OURS
    floor: float | None = None
    spread: tuple[float, float] = (0.0, 0.0)  # below and above the value
    hatch: str = ""


def _contenders(results: Result, shape: str, contestants: Mapping[str, Figures]) -> list[Bar]:
    """Return a bar for each contender, with the least and p90, its precision's floor, and hatched if it is wrong."""
    floors = {f.precision: 1e-3 * f.ms for f in results.floors if f"{f.batch}, {f.steps}" == shape}
    bars = []
    for name, of in contestants.items():
        contender, passed, median = contenders.find(name), of.against_fp32.passed, of.median_seconds
        bars.append(
            Bar(
                name=name,
                value=median,
                text="" if passed else ", wrong picture",
                colour=OURS if contender.ours else PEER,
                floor=floors.get(contender.precision),
                spread=(median - of.least_seconds, of.p90_seconds - median),
                hatch="" if passed else "//",
            )
        )
    return bars


def _bars(panel: Any, bars: Sequence[Bar], results: Result, x: str) -> None:
    """Draw horizontal bars, in seconds on a CPU and in milliseconds on a GPU."""
    scale, unit = (1.0, "seconds") if results.device == "cpu" else (1e3, "ms")
    for y, bar in enumerate(bars):
        spread = [[scale * bar.spread[0]], [scale * bar.spread[1]]] if any(bar.spread) else None
        panel.barh(y, scale * bar.value, xerr=spread, color=bar.colour, capsize=2, hatch=bar.hatch, edgecolor="white")
        if bar.floor is not None:
            panel.plot([scale * bar.floor] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        end = scale * max(bar.value + bar.spread[1], bar.floor or 0)
        panel.text(end, y, f"  {tables.number(scale * bar.value)}{bar.text}", va="center", fontsize=8)
    _name(panel, [bar.name for bar in bars], f"{unit} {x}; black: the floor")


def _cold(panel: Any, contestants: Mapping[str, Any]) -> None:
    """Draw a bar for each cold start: loading, the first picture, and the rest."""
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
    """Draw a line for each of ours."""
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
