"""The tables of one results file, as Markdown; for a terminal as well as for RESULTS.md."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import contenders
import figures
from result import Result
from rows import BenchmarkRun, Cold, Figures, Floor, Noise, Pair, Spread
from workload import TEXT_TO_IMAGE, Workload

GiB = 2**30
FEWEST_FOR_BOLD = 5  # rounds
EQUAL = 120.0  # dB
DISTURBED = 0.02  # of the machine's CPU time


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; nothing if there are no rows."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 2 else ""


def pairs(result: Result) -> str:
    """Return everything that bench.py measured: pairs, stages and floors, growth, batches, cold starts, targets."""
    what = f"{result.source}, {result.width}x{result.height}"
    parts = [f"**{what}**. {measured(result)}", _pairs(result), _stages(result), _lines(result), _cold(result)]
    return "\n\n".join(filter(None, parts)) + "\n"


def measured(result: Result) -> str:
    """Return on what, when and from which commits a file was measured."""
    first, *others = result.runs
    if not others:
        return f"Measured on {host(first)}, {made(first)}, {libraries(first)}."
    runs = "; ".join(f"{made(run)}, {libraries(run)}" for run in result.runs)
    return f"Measured on {host(first)}, in {len(result.runs)} runs: {runs}."


def host(run: BenchmarkRun) -> str:
    """Return the machine of a run."""
    m, gpu = run.machine, run.gpu
    name = f"{m.cores} cores of {m.cpu} ({', '.join(m.instruction_sets)}), {m.memory_bytes / GiB:.0f} GiB"
    return f"{gpu.name} (driver {gpu.driver}, CUDA {gpu.cuda}), {name}" if gpu else name


def made(run: BenchmarkRun) -> str:
    """Return the commit and date of a run."""
    return f"commit {run.commit}, {run.date[:10] if run.date else 'date not recorded'}"


def libraries(run: BenchmarkRun) -> str:
    """Return the versions that a figure depends on most."""
    shown = ("onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "openvino", "tensorrt", "tensorrt-rtx-cu13")
    shown += ("fastapi", "uvicorn", "pillow")
    return ", ".join(f"{name} {run.versions[name]}" for name in shown if name in run.versions)


def ratio(found: Spread) -> str:
    """Return a ratio with its extremes; bold if it is of enough rounds.

    If the median is not known well enough, the width of its interval is told. If some rounds say that the one contender
    is faster and some that the other is, the two are not separable.
    """
    bold = "**" if found.n >= FEWEST_FOR_BOLD else ""
    rounds = f"{found.least:.2f} to {found.most:.2f}, n {found.n}"
    if found.low is not None and not figures.is_narrow(found):
        rounds += f", ±{100 * figures.width(found):.0f}%"
    verdict = "; not separable" if found.least < 1 < found.most else ""
    return f"{bold}{found.median:.2f}×{bold} ({rounds}{verdict})"


def _pairs(result: Result) -> str:
    gpu = result.device != "cpu"
    plain = {shape(pair) for pair in result.pairs} == {PLAIN}
    side = ["ms (p90, p99)", "GPU ms", "× floor", "load + first"] if gpu else ["seconds (p90)", "load + first"]
    heading = ["ours", *side, "peer", *side, "faster by", "PSNR, ours", "PSNR, peer"]
    heading += ["GPU GiB" if gpu else "peak GiB", "peer's", "remarks"]
    rows = []
    for pair in result.pairs:
        first = [] if plain else [shape(pair)]
        both = ((pair.ours, pair.our_figures), (pair.peer, pair.peer_figures))
        named = [cell for name, of in both for cell in (name, *_times(result, pair, name, of))]
        figures = [of for _, of in both if of]
        psnr = [_psnr(of.against_fp32.psnr) for of in figures] or ["", ""]
        memory = [_memory(of, gpu) for of in figures] or ["", ""]
        by = ratio(pair.ratio) if pair.ratio else ""
        rows.append([*first, *named, by, *psnr, *memory, remarks(result, pair)])
    return table(heading if plain else ["batch, steps", *heading], rows)


PLAIN = "1, 1"
"""What `shape` says of one picture in one step, which a table does not say if it has nothing else."""


def shape(pair: Pair) -> str:
    """Return a pair's batch, steps, and the call if it is not text-to-image without guidance."""
    more = Workload(pair.task, pair.guidance_scale, pair.strength).text
    return f"{pair.batch}, {pair.steps}" + (f", {more}" if more else "")


def _times(result: Result, pair: Pair, name: str, of: Figures | None) -> list[str]:
    """Return a contender's times in a pair, as cells of the table."""
    gpu = result.device != "cpu"
    if of is None:
        return [""] * (4 if gpu else 2)
    loading = f"{of.load_seconds:.1f} + {of.first_picture_seconds:.1f}"
    if not gpu:
        return [f"{of.median_seconds:.2f} ({of.p90_seconds:.2f})", loading]
    p90, p99 = number(1e3 * of.p90_seconds), "" if of.p99_seconds is None else f", {number(1e3 * of.p99_seconds)}"
    work = "" if of.gpu_seconds is None else number(1e3 * of.gpu_seconds)
    floor = next((f for f in result.floors if (f.batch, f.steps) == (pair.batch, pair.steps)), None)
    over = f"{1e3 * of.median_seconds / _least(floor, name):.1f}" if floor else ""
    return [f"{number(1e3 * of.median_seconds)} ({p90}{p99})", work, over, loading]


def _least(floor: Floor, name: str) -> float:
    """Return the floor of a contender's call in ms."""
    return floor.cached_ms if contenders.find(name).mode == "cached" else floor.ms


def remarks(result: Result, pair: Pair) -> str:
    """Return remarks on a pair: what is not like for like, what went wrong, and its run if the file has several."""
    apart = "loaded by turns" if pair.apart else None
    both = ((pair.ours, pair.our_figures), (pair.peer, pair.peer_figures))
    of_contenders = [f"{name}: {of.remark}" for name, of in both if of and of.remark]
    run = made(result.runs[pair.run]) if len(result.runs) > 1 else None
    meanwhile = disturbed(pair.noise) if pair.noise else None
    return "; ".join(filter(None, (pair.differs, apart, *of_contenders, pair.reason, meanwhile, run)))


def disturbed(noise: Noise) -> str | None:
    """Return what took more than `DISTURBED` of the machine beside the contenders, or of its clock; None if nothing."""
    shares = {"stolen by the hypervisor": noise.steal, "other processes": noise.others}
    told = [f"{100 * share:.0f}% of the time {who}" for who, share in shares.items() if share > DISTURBED]
    before, after = noise.mhz or (1.0, 1.0)
    if abs(after / before - 1) > DISTURBED:
        told.append(f"{before:.0f} MHz before and {after:.0f} after")
    return ", ".join(told) or None


def stages(result: Result) -> list[tuple[str, str, float, float]]:
    """Return each contender of ours and its stages with the median seconds of a launch, and the stage's floor."""
    floors = {(floor.precision, floor.batch, floor.steps): floor for floor in result.floors}
    firsts: dict[tuple[str, int], Pair] = {}
    for pair in result.pairs:
        if pair.our_figures and pair.our_figures.stages:
            firsts.setdefault((pair.ours, pair.batch), pair)
    rows = []
    for pair in firsts.values():
        floor = floors.get((contenders.find(pair.ours).precision, pair.batch, pair.steps))
        name = pair.ours if pair.batch == 1 else f"{pair.ours}, batch {pair.batch}"
        for stage, seconds in pair.our_figures.stages.items() if floor and pair.our_figures else ():
            rows.append((name, stage, seconds, 1e-3 * floor.stages[stage].ms))
    return rows


def _stages(result: Result) -> str:
    scale, unit = (1, "seconds") if result.device == "cpu" else (1e3, "ms")
    rows = [
        [name, stage, f"{scale * seconds:.2f}", f"{scale * floor:.2f}", f"{seconds / floor:.2f}"]
        for name, stage, seconds, floor in stages(result)
    ]
    return table(["ours", "stage", unit, "floor", "× floor"], rows)


def _lines(result: Result) -> str:
    """Return the growth with the steps, the batches and the targets as a list."""
    lines = []
    for growth in result.growth:
        each = ", ".join(f"{seconds:.2f}" for seconds in growth.seconds.values())
        counts = list(growth.seconds)
        lines.append(
            f"- {growth.ours}, {counts[0]} to {counts[-1]} steps: {each} s, {growth.slope_seconds:.2f} s per step; the "
            f"UNet alone takes {growth.unet_seconds:.2f} s (ratio, round by round: {growth.ratio.median:.3f})"
        )
    for of in result.batches:
        if of.ratio:
            each = ", ".join(f"{seconds:.2f}" for seconds in of.seconds.values())
            worst = max(found.median for found in of.ratio.values())
            lines.append(
                f"- {of.ours}, batch {', '.join(of.seconds)}: {each} s per picture, at most {worst:.2f} of the time "
                "that one alone takes"
            )
        lines += [f"- {of.ours}, batch {count}: {reason}" for count, reason in of.reasons.items()]
    return "\n".join([*lines, *_targets(result)])


def _cold(result: Result) -> str:
    rows = []
    for of in result.cold:
        if of.ratio is None:
            rows.append([of.ours, "", "", "", f"against {of.peer}: {of.reason}"])
            continue
        for name, taken in of.seconds.items():
            figures = [f"{value:.1f}" for value in (taken.whole, taken.load, taken.picture)]
            rows.append([name, *figures, _cold_ratio(of) if name == of.ours else ""])
    return table(["cold start", "seconds", "of it load", "picture", "faster by"], rows)


def _cold_ratio(of: Cold) -> str:
    return ratio(of.ratio) if of.ratio else ""


TARGET_MS = {
    "synthetic:sd-turbo": 9.5,
    "stabilityai/sd-turbo": 9.5,
    "synthetic:sdxl-turbo": 14.0,
    "stabilityai/sdxl-turbo": 14.0,
}
"""The most that our chain may take on an H200 for one picture of 512x512 in one step: median wall clock."""
TARGET_GPU, TARGET_RATIO = "H200", 5.0  # times faster than eager fp16, on any GPU
EAGER = "eager-fp16"
"""The peer of that ratio: diffusers as it is. Stronger forms of it are targets of their own if they were measured."""


@dataclass(frozen=True)
class Target:
    """A bound that our chain should reach on a GPU, and the value reached; None if no row counts."""

    what: str
    bound: float
    at_least: bool
    ours: str
    value: float | None

    @property
    def passed(self) -> bool | None:
        """Return whether it is reached."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(result: Result) -> list[Target]:
    """Return the targets of a full-size model on a GPU: one step, batch 1, 512x512."""
    if result.device == "cpu" or (result.width, result.height) != (512, 512) or result.source not in TARGET_MS:
        return []
    p50: dict[str, float] = {}
    ratios: dict[tuple[str, str], float] = {}
    for pair in (p for p in result.pairs if (p.batch, p.steps, p.task) == (1, 1, TEXT_TO_IMAGE)):
        both = {pair.ours: pair.our_figures, pair.peer: pair.peer_figures}
        right = {name: 1e3 * of.median_seconds for name, of in both.items() if of and of.against_fp32.passed}
        p50 = right | p50
        if len(right) == 2 and pair.ratio:
            ratios[pair.ours, pair.peer] = pair.ratio.median
    ours = next((name for name in ("tensorrt-fp16", "onnxruntime-fp16") if name in p50), "")
    eager = {n for _, n in ratios if contenders.find(n).kind == "eager" and contenders.find(n).precision == "fp16"}
    found = [
        Target(f"times faster than {peer}, at least", TARGET_RATIO, True, ours, ratios.get((ours, peer)))
        for peer in sorted({EAGER, *eager})
    ]
    if TARGET_GPU in result.device:
        found.append(Target("median wall clock in ms, at most", TARGET_MS[result.source], False, ours, p50.get(ours)))
    return found


def _targets(result: Result) -> list[str]:
    verdicts = {True: "passed", False: "missed", None: "not decided"}
    return [
        f"- target: {t.what} {t.bound:g}: {'no row counts' if t.value is None else f'{number(t.value)} ({t.ours})'}, "
        f"**{verdicts[t.passed]}**"
        for t in targets(result)
    ]


def _psnr(value: float) -> str:
    return "equal" if value >= EQUAL else f"{value:.1f}"


def _memory(of: Figures, gpu: bool) -> str:
    size = of.gpu_memory_bytes if gpu else of.peak_rss_bytes
    return "" if size is None else f"{size / GiB:.1f}"


def number(value: float) -> str:
    """Return three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
