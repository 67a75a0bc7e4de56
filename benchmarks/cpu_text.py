"""The results of benchmarks/cpu.py as text for a terminal."""

from typing import Any

from turbochain.runtime.commands import console

INCLUDES = {
    "seconds": "prompt string to uint8 pictures in host memory: tokenising, noise and every stage; without loading, "
    "the first picture and image encoding",
    "load": "the contender's libraries imported and its pipeline loaded, in a fresh process; files are mostly cached",
    "first picture": "the first call after loading",
    "peak_rss_bytes": "VmHWM of the contender's process, from its start to its last picture: mapped files count",
    "rss_anon_bytes": "RssAnon after the last picture: what is not of files",
    "ratio": "the peer's seconds ÷ ours, for each two pictures that were drawn one after the other",
    "order": "one picture of ours, one of the peer, and again; where a pair is `apart`, each is loaded anew for every "
    "picture, the one after its first",
    "cold": "from the start of a process to its end, with a PNG on disk: the interpreter, loading (`load`, with the "
    "imports), the first picture (`picture`) and encoding it; files are in the page cache from the run before",
    "batches": "seconds for each picture of a batch, drawn by turns with one picture alone; the ratio is of such "
    "neighbours",
    "steps": "calls of 1 step, 2 steps and so on by turns; the slope is that of a straight line through such a round, "
    "the ratio that slope ÷ the mean of the UNet's launches in the same round",
    "floors": "per stage the larger of floating-point operations (Conv, MatMul and Gemm of the ONNX graphs; a "
    "multiply-add is two) ÷ this machine's rate in a large matrix product or convolution of that precision, by "
    "PyTorch, and bytes (weights as stored, inputs, outputs, each once) ÷ its copy bandwidth; OpenVINO's graphs do 15% "
    "fewer operations in the VAE decoder than the ONNX graphs (merged upsampling), so that it can be below",
    "reference": "diffusers, eager, fp32: the same checkpoint, prompt, seed and noise",
}
"""What the figures of a result are of."""


def text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    rows = [["ours", "s", "peer", "s", "faster by", "least", "most", "PSNR", "peer's", "peak GiB", "peer's", ""]]
    for pair in result["pairs"]:
        said = remarks(pair)
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
    for of in result["steps"]:
        each = ", ".join(f"{seconds:.2f}" for seconds in of["seconds"].values())
        parts.append(
            f"{of['ours']}, steps {', '.join(map(str, of['seconds']))}: {each} s; "
            f"{of['slope_seconds']:.2f} s a step, the UNet alone {of['unet_seconds']:.2f} s"
        )
    for of in result["cold"]:
        if of["reason"]:
            parts.append(f"cold start: {of['ours']} against {of['peer']}: {of['reason']}")
            continue
        ours, peer = (
            f"{name} {taken['whole']:.1f} s (load {taken['load']:.1f}, picture {taken['picture']:.1f})"
            for name, taken in of["seconds"].items()
        )
        parts.append(f"cold start: {ours}, {peer}: {of['ratio']['median']:.2f} times as fast")
    parts += batches(result)
    return "\n\n".join(parts)


def remarks(pair: dict[str, Any]) -> str:
    """What a pair's row says at its end."""
    apart = "each loaded anew for every picture" if pair.get("apart") else None
    commit = f"measured at commit {pair['commit']}" if "commit" in pair else None
    return "; ".join(filter(None, (pair["differs"], apart, commit, pair["reason"])))


def batches(result: dict[str, Any]) -> list[str]:
    """What a picture costs in larger batches, a sentence for each engine, and one for each batch that failed."""
    lines = []
    for of in result["batches"]:
        if of["ratio"]:
            each = ", ".join(f"{seconds:.2f}" for seconds in of["seconds"].values())
            worst = max(ratio["median"] for ratio in of["ratio"].values())
            lines.append(
                f"{of['ours']}, batch {', '.join(map(str, of['seconds']))}: {each} s for each picture, at most "
                f"{worst:.2f} of what one alone takes"
            )
        lines += [f"{of['ours']}, batch {count}: {reason}" for count, reason in of["reasons"].items()]
    return lines


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
