"""The results of benchmarks/cpu.py as text for a terminal."""

from typing import Any

from turbochain.runtime import console


def text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    rows = [["ours", "s", "peer", "s", "faster by", "least", "most", "PSNR", "peer's", "peak GiB", "peer's", ""]]
    for pair in result["pairs"]:
        said = "; ".join(filter(None, (pair["differs"], pair["reason"])))
        if "of" not in pair:
            rows.append([pair["ours"], "", pair["peer"], *[""] * 8, said])
            continue
        ours, peer, ratio = pair["of"]["ours"], pair["of"]["peer"], pair["ratio"]
        figures = [f"{ratio[k]:.2f}" for k in ("median", "least", "most")]
        figures += [f"{of['against_fp32']['psnr']:.1f}" for of in (ours, peer)]
        figures += [f"{of['peak_rss_bytes'] / 2**30:.1f}" for of in (ours, peer)]
        seconds = [f"{of['median_seconds']:.2f}" for of in (ours, peer)]
        rows.append([pair["ours"], seconds[0], pair["peer"], seconds[1], *figures, said])
    parts = [result["what"], console.table(rows)]
    if stages(result):
        head = ["ours", "stage", "seconds", "floor", "× floor"]
        parts.append(
            console.table([head, *([*row[:2], *(f"{v:.2f}" for v in row[2:])] for row in stages(result))], left=2)
        )
    for of in result.get("steps", ()):
        each = ", ".join(f"{seconds:.2f}" for seconds in of["seconds"].values())
        parts.append(
            f"{of['ours']}, steps {', '.join(map(str, of['seconds']))}: {each} s; "
            f"{of['slope_seconds']:.2f} s a step, the UNet alone {of['unet_seconds']:.2f} s"
        )
    for of in result.get("cold", ()):
        ours, peer = (
            f"{name} {taken['whole']:.1f} s (load {taken['load']:.1f}, picture {taken['picture']:.1f})"
            for name, taken in of["seconds"].items()
        )
        parts.append(f"cold start: {ours}, {peer}: {of['ratio']['median']:.2f} times as fast")
    for of in result.get("batches", ()):
        each = ", ".join(f"{seconds:.2f}" for seconds in of["seconds"].values())
        parts.append(f"{of['ours']}, batch {', '.join(map(str, of['seconds']))}: {each} s for each picture")
    return "\n\n".join(parts)


def stages(result: dict[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """For each of our engines and its stages: median seconds of a launch, the floor, and how many times that it is."""
    rows = []
    first = {pair["ours"]: pair["of"]["ours"] for pair in reversed(result["pairs"]) if "of" in pair}
    for ours, of in first.items():
        floors = result["floors"].get(ours.rpartition("-")[2], {"stages": {}})["stages"]
        for stage, seconds in of["stages"].items() if floors else ():
            least = 1e-3 * floors[stage]["ms"]
            rows.append((ours, stage, seconds, least, seconds / least))
    return rows
