"""Write the figures of benchmarks/results/*.json and the demo model's scores into README.md, between its markers.

python benchmarks/report.py
"""

import json
from pathlib import Path
from typing import Any

import cpu_text
from turbochain.runtime.commands import console

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SCORES = HERE.parent / "tests/demo_model/metrics.json"
START, END = "<!-- figures: python benchmarks/report.py -->\n", "<!-- end of figures -->"
GiB = 2**30


def main() -> None:
    """Replace the block."""
    before, rest = README.read_text().split(START)
    README.write_text(before + START + figures() + END + rest.split(END)[1])


def figures() -> str:
    """The block: the tables of every results file."""
    paths = sorted((HERE / "results").glob("*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    on_cpu = [r for r in results if "build" in r]
    on_gpu = [r for r in results if "cells" in r and r["gpu"] != "cpu"]
    tables = [demo_table(json.loads(SCORES.read_text()))]
    by_pairs = {path: r for path, r in zip(paths, results, strict=True) if "pairs" in r}
    tables += [pair_table(r) + _plot(path) for path, r in by_pairs.items()]
    tables += [f"{note}\n" for note in dict.fromkeys(note for r in by_pairs.values() for note in _pair_notes(r))]
    tables += [variants_table(r) for r in results if "graphs" in r]
    return "\n".join([*tables, cpu_table(on_cpu), gpu_tables(on_gpu)])


def _plot(results: Path) -> str:
    return f"\n![these figures as bars and lines]({results.with_suffix('.png').relative_to(README.parent)})\n"


def demo_table(scores: dict[str, Any]) -> str:
    """grade.py's scores: a row for each pipeline, and a column per number of steps and of objects."""
    counts = {name: of for name, of in scores.items() if "step" in name}
    drawn, objects = ("diffusers fp32", "fp32 bundle", "fp16 bundle"), ("one object", "two objects")
    heading = ["pictures without a fault", *(f"{o}, {steps}" for steps in counts for o in objects)]
    lines = [_row(heading), _row(["---"] * len(heading))]
    for name in drawn:
        found = (of[name][o] for of in counts.values() for o in objects)
        lines.append(_row([name, *(f"{f['right']} of {f['prompts']}" for f in found)]))
    one, psnr = counts["1 step"], scores["vae_psnr_db"]
    exact, half = (one[f"{precision} bundle against diffusers"] for precision in ("fp32", "fp16"))
    notes = (
        f"At one step the fp32 bundle differs from diffusers by at most {exact['max_abs']} of 255 levels, in at most "
        f"{exact['largest fraction_differing']:.3%} of a picture's values; the fp16 bundle by a PSNR of "
        f"{half['lowest psnr_db']} dB or more. The VAE alone returns a drawn picture with {psnr['mean']} dB "
        f"({psnr['lowest']} at the least).",
        f"Measured on {_machine(scores)}.",
    )
    return "\n".join([*lines, "", *notes]) + "\n"


def pair_table(result: dict[str, Any]) -> str:
    """cpu.py's results: a row for each pair, and what else was measured of our engines."""
    measured = f"Measured on {_machine(result)}, openvino {result['versions']['openvino']}, commit {result['commit']}."
    parts = (
        [f"**{result['what']}**. {measured}"],
        _pairs(result),
        _stages(result),
        _steps(result) + [f"- {line}" for line in cpu_text.batches(result)],
        _cold(result),
    )
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _pairs(result: dict[str, Any]) -> list[str]:
    """A row for each pair."""
    if not result["pairs"]:
        return []
    heading = ["ours", "seconds (p90)", "load + first", "peer", "seconds (p90)", "load + first", "faster by"]
    heading += ["PSNR, ours", "PSNR, peer", "peak GiB", "peer's", ""]
    lines = [_row(heading), _row(["---"] * len(heading))]
    for pair in result["pairs"]:
        said = cpu_text.remarks(pair)
        if "of" not in pair:
            lines.append(_row([pair["ours"], "", "", pair["peer"], *[""] * 7, said]))
            continue
        ours, peer, ratio = pair["of"]["ours"], pair["of"]["peer"], pair["ratio"]
        psnr = [_psnr(of["against_fp32"]["psnr"]) for of in (ours, peer)]
        memory = [f"{of['peak_rss_bytes'] / GiB:.1f}" for of in (ours, peer)]
        by = f"**{ratio['median']:.2f}×** ({ratio['least']:.2f} to {ratio['most']:.2f}, n {ratio['n']})"
        cells = [cell for name in ("ours", "peer") for cell in (pair[name], *_seconds(pair["of"][name]))]
        lines.append(_row([*cells, by, *psnr, *memory, said]))
    return lines


def _pair_notes(result: dict[str, Any]) -> tuple[str, ...]:
    """What the figures of `pair_table` are of."""
    says = result["includes"]
    return (
        "Medians; one picture of ours, one of the peer's, and again; the ratio is of such neighbours. Seconds: "
        f"{says['seconds']}. Load: {says['load']}; first: {says['first picture']}. PSNR in dB against eager "
        f"fp32. Peak: {says['peak_rss_bytes']}.",
        f"Floor: {says['floors']}.",
        f"Cold start: {says['cold']}.",
    )


def _seconds(of: dict[str, Any]) -> tuple[str, str]:
    """A contender's median and p90; what it takes to load, and its first picture."""
    return (
        f"{of['median_seconds']:.2f} ({of['p90_seconds']:.2f})",
        f"{of['load_seconds']:.1f} + {of['first_picture_seconds']:.1f}",
    )


def _stages(result: dict[str, Any]) -> list[str]:
    """What each stage of ours takes, and how far that is from the floor."""
    rows = [["ours", "stage", "seconds", "floor", "× floor"], ["---"] * 5]
    rows += [[*row[:2], *(f"{value:.2f}" for value in row[2:])] for row in cpu_text.stages(result)]
    return list(map(_row, rows)) if len(rows) > 2 else []


def _steps(result: dict[str, Any]) -> list[str]:
    """How the time grows with the steps."""
    lines = []
    for of in result["steps"]:
        each = ", ".join(f"{seconds:.2f}" for seconds in of["seconds"].values())
        lines.append(
            f"- {of['ours']}, {' to '.join((min(of['seconds']), max(of['seconds'])))} steps: {each} s, "
            f"{of['slope_seconds']:.2f} s a step; the UNet alone takes {of['unet_seconds']:.2f} s (ratio, round by "
            f"round: {of['ratio']['median']:.3f})"
        )
    return lines


def _cold(result: dict[str, Any]) -> list[str]:
    """From the start of a process to a picture on disk."""
    rows = [["cold start", "seconds", "of it load", "picture", "faster by"], ["---"] * 5]
    for of in result["cold"]:
        if of["reason"]:
            rows.append([of["ours"], "", "", "", f"against {of['peer']}: {of['reason']}"])
            continue
        spread = f"{of['ratio']['median']:.2f}× ({of['ratio']['least']:.2f} to {of['ratio']['most']:.2f})"
        for name, taken in of["seconds"].items():
            figures = [f"{taken[key]:.1f}" for key in ("whole", "load", "picture")]
            rows.append([name, *figures, spread if name == of["ours"] else ""])
    return list(map(_row, rows)) if result["cold"] else []


def variants_table(result: dict[str, Any]) -> str:
    """variants.py's results: a row for each variant, columns for each graph."""
    graphs = result["graphs"]
    heading = [f"tried with OpenVINO in {result['precision']}, {result['what']}"]
    heading += [f"{graph}: {what}" for graph in graphs for what in ("speed", "error", "load s")]
    lines = [_row(heading), _row(["---"] * len(heading))]
    of = {graph: {row["variant"]: row for row in rows} for graph, rows in graphs.items()}
    for name in dict.fromkeys(name for rows in of.values() for name in rows):
        lines.append(_row([name, *(cell for rows in of.values() for cell in _tried(rows.get(name)))]))
    says = result["includes"]
    notes = (
        f"Speed: {says['ratio']}. Error: {says['error']}. Load: {says['load']}.",
        f"Measured on {_machine(result)}, openvino {result['versions']['openvino']}, commit {result['commit']}.",
    )
    return "\n".join([*lines, "", *notes]) + "\n"


def _tried(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    ratio = row.get("ratio")
    speed = (
        f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else f"{row['seconds']:.2f} s"
    )
    cache = f", {row['cache_bytes'] / GiB:.1f} GiB on disk" if "cache_bytes" in row else ""
    return [speed, f"{row['error']:.2g}", f"{row['load_seconds']:.1f}{cache}"]


def _psnr(value: float) -> str:
    return "equal" if value >= 120 else f"{value:.1f}"


def cpu_table(results: list[dict[str, Any]]) -> str:
    """measure.py's results: a column for each, and what it was measured on."""
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


def gpu_tables(results: list[dict[str, Any]]) -> str:
    """gpu.py's results: for each a row per contender and a column per cell, and what of it does not count."""
    if not results:
        return "On a GPU nothing has been measured yet; `make bench-gpu` does it.\n"
    return "\n".join(_gpu_table(r) for r in results)


def _gpu_table(result: dict[str, Any]) -> str:
    cells = result["cells"]
    run = result["runs"][cells[-1]["run"]]
    used = {"driver": run["gpu"]["driver"], "CUDA": run["gpu"]["cuda"]}
    used |= {
        k: v for k, v in run["versions"].items() if k.startswith(("torch", "diffusers", "tensorrt", "onnxruntime"))
    }
    lines = [
        f"**{result['source']} on {result['gpu']}**, {result['date']}, commit {run['commit']}, "
        f"{', '.join(f'{k} {v}' for k, v in used.items() if v)}. "
        "Milliseconds, prompt string to uint8 picture in host memory: p50 / p99 (p50 ÷ floor).",
        "",
        _row(["", *map(_cell_name, cells)]),
        _row(["---"] * (1 + len(cells))),
    ]
    names = dict.fromkeys(row["contender"] for cell in cells for row in cell["rows"])
    rows = [{row["contender"]: row for row in cell["rows"]} for cell in cells]
    lines += [_row([name, *(_figure(of.get(name)) for of in rows)]) for name in names]
    lines.append(_row(["floor", *(number(c["floor"] and c["floor"]["ms"]) for c in cells)]))
    return "\n".join([*lines, "", *dict.fromkeys(n for c in cells for n in _notes(c))]) + "\n"


def _cell_name(cell: dict[str, Any]) -> str:
    return f"{cell['width']}x{cell['height']} {cell['precision']}, steps {cell['steps']}, batch {cell['batch']}"


def _figure(row: dict[str, Any] | None) -> str:
    if row is None or row["wall"] is None:
        return row["status"] if row else ""
    over = f" ({row['over_floor']:.1f}×)" if row["over_floor"] else ""
    mark = "*" if row["differs"] or row["remark"] else ""
    wrong = "" if row["status"] == "ok" else f", {row['status']}"
    return f"{number(row['wall']['p50_ms'])} / {number(row['wall']['p99_ms'])}{mark}{over}{wrong}"


def number(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _notes(cell: dict[str, Any]) -> list[str]:
    """What of a cell's rows is missing, wrong or not like for like, and the bars."""
    notes = []
    for row in cell["rows"]:
        said = [row["differs"], row["remark"], row["reason"] and f"{row['status']}: {row['reason']}"]
        notes += [f"- {row['contender']}: {what}" for what in said if what]
    verdicts = {True: "passed", False: "missed", None: "not decided"}
    for bar in cell["bars"]:
        value = f"{number(bar['value'])} ({bar['contender']})" if bar["value"] else "no row counts"
        notes.append(
            f"- bar, {_cell_name(cell)}: {bar['what']} {bar['bound']:g}: {value}, **{verdicts[bar['passed']]}**"
        )
    return notes


def cell_text(cell: dict[str, Any]) -> str:
    """A cell of gpu.py as text for a terminal."""
    rows = [["contender", "p50 ms", "p90", "p99", "min", "n", "GPU p50", "× floor", "load s", "first s", "GPU MiB", ""]]
    for row in cell["rows"]:
        wall, memory = row["wall"] or {}, row["gpu_memory_bytes"]
        figures = [number(wall.get(k)) for k in ("p50_ms", "p90_ms", "p99_ms", "min_ms")]
        figures += [str(wall.get("n", "")), number(row["gpu"] and row["gpu"]["p50_ms"]), number(row["over_floor"])]
        figures += [number(row["load_seconds"]), number(row["first_image_seconds"])]
        figures += ["" if memory is None else f"{memory / 2**20:.0f}"]
        rows.append([row["contender"], *figures, "" if row["status"] == "ok" else row["status"]])
    floor = cell["floor"]
    least = f"floor {floor['ms']:.3g} ms, {floor['cached_ms']:.3g} ms without text encoders" if floor else "no floor"
    return "\n".join([_cell_name(cell), console.table(rows), least, *_notes(cell)])


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
