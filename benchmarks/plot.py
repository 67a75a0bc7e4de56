"""Latency bars of a results file of benchmarks/gpu.py, with their spread, and beside each the floor.

python benchmarks/plot.py benchmarks/results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from report import number

COLOURS = {"eager": "tab:gray", "compiled": "tab:orange", "onnxruntime": "tab:blue", "tensorrt": "tab:green"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write `path` (PNG): a panel for each cell; the bar is p50, the line on it reaches from the least to p99."""
    cells = results["cells"]
    figure, panels = pyplot.subplots(
        len(cells), figsize=(9, sum(1.1 + 0.32 * len(c["rows"]) for c in cells)), squeeze=False, layout="constrained"
    )
    for panel, cell in zip(panels[:, 0], cells, strict=True):
        _draw_cell(panel, cell)
    figure.suptitle(f"{results['source']} on {results['gpu']}, {results['date']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_cell(panel: Any, cell: dict[str, Any]) -> None:
    rows = cell["rows"]
    for y, row in enumerate(rows):
        wall = row["wall"]
        if wall is None:
            panel.text(0, y, f" {row['status']}", va="center", color="tab:red", fontsize=8)
            continue
        p50 = wall["p50_ms"]
        spread = [[p50 - wall["min_ms"]], [wall["p99_ms"] - p50]]
        colour = COLOURS.get(row["contender"].split("-")[0])
        panel.barh(y, p50, xerr=spread, color=colour, alpha=1 if row["status"] == "ok" else 0.3, capsize=2)
        note = (
            f" {number(p50)}"
            + (" *" if row["differs"] else "")
            + (f" {row['status']}" if row["status"] != "ok" else "")
        )
        panel.text(wall["p99_ms"], y, note, va="center", fontsize=8)
        if row["floor_ms"]:
            panel.plot([row["floor_ms"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    panel.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.margins(x=0.15)
    panel.set_xlim(left=0)
    steps = f"{cell['steps']} step{'s' * (cell['steps'] > 1)}"
    panel.set_title(f"{cell['width']}x{cell['height']}, {steps}, batch {cell['batch']}", fontsize=9, loc="left")
    panel.set_xlabel("ms, prompt to picture; black: the floor; *: not like for like", fontsize=8)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
