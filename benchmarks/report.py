"""Write the figures of benchmarks/results/*.json into README.md, between its markers.

python benchmarks/report.py
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- figures: python benchmarks/report.py -->\n", "<!-- end of figures -->"
GiB = 2**30


def main() -> None:
    """Replace the block."""
    before, rest = README.read_text().split(START)
    README.write_text(before + START + figures() + END + rest.split(END)[1])


def figures() -> str:
    """The block: a table with a column per results file, and what it was measured on."""
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("synthetic-*.json"))]
    columns = [_column(r) for r in results]
    heading = ["", *(f"{r['what']}" for r in results)]
    lines = [_row(heading), _row(["---"] * len(heading))]
    names = dict.fromkeys(name for column in columns for name in column)
    lines += [_row([name, *(column.get(name, "") for column in columns)]) for name in names]
    machines = sorted({_machine(r) for r in results})
    notes = [f"Measured on {m}." for m in machines]
    notes.append(results[0]["machine"]["note"].capitalize() + ".")
    notes.append(
        "End to end is prompt string to uint8 picture in host memory; overhead is what of it no stage accounts for."
    )
    return "\n".join([*lines, "", *notes]) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _column(r: dict[str, Any]) -> dict[str, str]:
    phases, load, bench = r["build"]["phases"], r["load"], r["bench"]["1"]
    column = {
        "commit": r["commit"],
        "build, whole": f"{sum(p['seconds'] for p in phases):.0f} s",
        "build, largest peak of a phase": _largest(phases),
        "load": f"{load['seconds']:.1f} s",
        "load, peak RssAnon": f"{load['peak_rss_anon_bytes'] / GiB:.2f} GiB, {load['ratio']:.2f} × weights",
        "end to end, 1 step, p50": f"{bench['end_to_end']['p50_ms'] / 1e3:.2f} s",
    }
    column |= {f"— {name}": f"{t['p50_ms'] / 1e3:.2f} s" for name, t in bench["stages"].items()}
    column["— overhead, p50"] = f"{bench['overhead']['p50_ms']:.1f} ms"
    column |= {f"{c['stage']}: {c['metric']}": f"{c['value']:.2g} (bound {c['bound']:g})" for c in r["build"]["checks"]}
    return column


def _largest(phases: list[dict[str, Any]]) -> str:
    worst = max(phases, key=lambda p: p["peak_bytes"])
    return f"{worst['peak_bytes'] / GiB:.1f} GiB ({worst['name']})"


def _machine(r: dict[str, Any]) -> str:
    m, v = r["machine"], r["versions"]
    return (
        f"{m['cores']} cores of {m['cpu']} ({', '.join(m['instruction_sets'])}), {m['memory_bytes'] / GiB:.0f} GiB, "
        f"{r['date'][:10]}, onnxruntime {v['onnxruntime']}, torch {v['torch']}, diffusers {v['diffusers']}"
    )


if __name__ == "__main__":
    main()
