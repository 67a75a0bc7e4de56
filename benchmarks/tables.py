"""The tables of one results file, as Markdown; for a terminal as well as for RESULTS.md."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import contenders
import figures
from call import TEXT_TO_IMAGE, Call
from result import Result
from rows import Adapted, Build, Cold, Figures, Floor, Noise, Pair, Run, Spread, Tried

GiB = 2**30
FEWEST_FOR_BOLD = 5  # rounds
EQUAL = 120.0  # dB
DISTURBED = 0.02  # of the machine's CPU time
SWAP_MS = 50
"""The most that a change between two adapters may take, in ms."""
SLOTS_SHARE = {"fp32": 1.08, "bf16": 1.12}
"""Precision → the most that the UNet may take with slots of rank 32, as a multiple of the one without: of SD-Turbo at
512x512."""
OWN_MS = 5
"""The most that the server may add to the encoding of a picture, in ms."""


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


def host(run: Run) -> str:
    """Return the machine of a run."""
    m, gpu = run.machine, run.gpu
    name = f"{m.cores} cores of {m.cpu} ({', '.join(m.instruction_sets)}), {m.memory_bytes / GiB:.0f} GiB"
    return f"{gpu.name} (driver {gpu.driver}, CUDA {gpu.cuda}), {name}" if gpu else name


def made(run: Run) -> str:
    """Return the commit and date of a run."""
    return f"commit {run.commit}, {run.date[:10] if run.date else 'date not recorded'}"


def libraries(run: Run) -> str:
    """Return the versions that a figure depends on most."""
    shown = ("onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "openvino", "tensorrt", "tensorrt-rtx-cu13")
    shown += ("fastapi", "uvicorn", "pillow")
    return ", ".join(f"{name} {run.versions[name]}" for name in shown if name in run.versions)


def ratio(found: Spread) -> str:
    """Return a ratio with its extremes; bold if it is of enough rounds.

    The width of its median's interval is told if that is not settled, and it is not separable if rounds contradict
    each other on which contender is faster.
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
    call = Call(pair.task, pair.guidance_scale, pair.strength).text
    return f"{pair.batch}, {pair.steps}" + (f", {call}" if call else "")


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
    """Return what took more than `DISTURBED` of the machine beside the contenders; None if nothing did."""
    shares = {"stolen by the hypervisor": noise.steal, "other processes": noise.others}
    told = [f"{100 * share:.0f}% of the time {who}" for who, share in shares.items() if share > DISTURBED]
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


def variants(result: Result) -> str:
    """Return the table of variants.py: a row for each variant, columns for each graph."""
    graphs = list(dict.fromkeys(row.graph for row in result.variants))
    found = {(row.graph, row.variant): row for row in result.variants}
    heading = [
        f"tried with OpenVINO in {result.variants[0].precision}, {result.source}, {result.width}x{result.height}"
    ]
    heading += [f"{graph}: {what}" for graph in graphs for what in ("speed", "error", "load s")]
    rows = [
        [name, *(cell for graph in graphs for cell in _tried(found.get((graph, name))))]
        for name in dict.fromkeys(row.variant for row in result.variants)
    ]
    return f"{table(heading, rows)}\n\n{measured(result)}\n"


def _tried(row: Tried | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    speed = f"{row.seconds:.2f} s"
    if row.ratio:
        speed = f"{row.ratio.median:.2f} ({row.ratio.least:.2f} to {row.ratio.most:.2f})"
    cache = "" if row.cache_bytes is None else f", {row.cache_bytes / GiB:.1f} GiB on disk"
    return [speed, f"{row.error:.2g}", f"{row.load_seconds:.1f}{cache}"]


def builds(results: Sequence[Result]) -> str:
    """Return the table of build_cost.py: a column for each build, and what it was measured on."""
    columns = [_build(result, build) for result in results for build in result.builds]
    names = dict.fromkeys(name for column in columns for name in column if name)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    notes = dict.fromkeys(f"{result.source}: {measured(result)}" for result in results)
    return "\n\n".join([table(["", *(column[""] for column in columns)], rows), *notes]) + "\n"


def _build(result: Result, build: Build) -> dict[str, str]:
    bench, phases, memory = build.bench["1"], build.build["phases"], build.load_peak_rss_anon_bytes
    worst = max(phases, key=lambda phase: phase["peak_bytes"])
    column = {
        "": f"{result.source}, {build.precision}, {result.width}x{result.height}, batch 1",
        "commit": result.runs[build.run].commit,
        "build, whole": f"{sum(phase['seconds'] for phase in phases):.0f} s",
        "build, largest peak of a phase": f"{worst['peak_bytes'] / GiB:.1f} GiB ({worst['name']})",
        "load": f"{build.load_seconds:.1f} s",
        "load, peak RssAnon": f"{memory / GiB:.2f} GiB, {memory / build.load_weight_bytes:.2f} × weights",
        "end to end, 1 step, p50": f"{bench['end_to_end']['p50_ms'] / 1e3:.2f} s",
    }
    column |= {f"— {name}": f"{timing['p50_ms'] / 1e3:.2f} s" for name, timing in bench["stages"].items()}
    column["— overhead, p50"] = f"{bench['overhead']['p50_ms']:.1f} ms"
    checks = build.build["checks"]
    return column | {f"{c['stage']}: {c['metric']}": f"{c['value']:.2g} (bound {c['bound']:g})" for c in checks}


def served(results: Sequence[Result]) -> str:
    """Return the table of serve_cost.py, and what it was measured on."""
    heading = ["a picture that is ready", "server", "bare uvicorn", "encoding", "own cost, p50 of each round"]
    rows = []
    for found in results:
        for row in found.served:
            times = (f"{of.p50 * 1e3:.1f} ({of.p90 * 1e3:.1f})" for of in (row.server, row.echo, row.encoding))
            own = sorted(row.own_seconds)
            median = own[len(own) // 2] * 1e3
            verdict = "passed" if median <= OWN_MS else "**missed**"
            rows.append([
                f"{found.width}x{found.height}, {row.format}, {row.answer_bytes / 1024:.0f} KiB",
                *times,
                f"{median:.1f} ({own[0] * 1e3:.1f} to {own[-1] * 1e3:.1f}); at most {OWN_MS}: {verdict}",
            ])  # fmt: skip
    notes = dict.fromkeys(measured(found) for found in results)
    return "\n\n".join([table(heading, rows), "Milliseconds: p50 (p90).", *notes]) + "\n"


def adapted(results: Sequence[Result]) -> str:
    """Return the table of adapter_cost.py, and what it was measured on."""
    heading = ["slots", "UNet, with ÷ without", "UNet without, s", "a swap, ms", "load, ms", "memory over the swaps"]
    rows = []
    for found in results:
        for row in found.adapted:
            verdict = "passed" if row.swap.p50 * 1e3 <= SWAP_MS else "**missed**"
            what = f"{found.source}, {found.width}x{found.height}, {row.engine}, {row.precision}, rank {row.rank}"
            rows.append([
                what,
                _shares(row.plain_seconds, row.slots_seconds, _most_of_slots(found, row)),
                f"{median(row.plain_seconds):.3f}",
                f"{row.swap.p50 * 1e3:.1f} ({row.swap.p90 * 1e3:.1f}); at most {SWAP_MS}: {verdict}",
                f"{median(row.load_seconds) * 1e3:.0f}",
                f"{(row.rss_after - row.rss_before) / 2**20:+.1f} MiB over {row.swaps}",
                {True: "yes", False: "**no**", None: "not tried"}[row.equal_bits],
            ])  # fmt: skip
    notes = dict.fromkeys(measured(found) for found in results)
    return "\n\n".join([table([*heading, "equal states, equal bits"], rows), "A swap: p50 (p90).", *notes]) + "\n"


def _most_of_slots(found: Result, row: Adapted) -> float | None:
    """Return the most that a UNet with slots may take, if there is a bar for it."""
    is_barred = found.source.endswith("sd-turbo") and (found.width, found.height, row.rank) == (512, 512, 32)
    return SLOTS_SHARE.get(row.precision) if is_barred else None


def _shares(plain: Sequence[float], changed: Sequence[float], most: float | None = None) -> str:
    """Return the median ratio of the rounds with the extremes, and whether it is at most so large."""
    ratios = sorted(b / a for a, b in zip(plain, changed, strict=True))
    found = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), n = {len(ratios)}"
    return found + ("" if most is None else f"; at most {most}: {'passed' if median(ratios) <= most else '**missed**'}")


def beside(results: Sequence[Result]) -> str:
    """Return the table of unet_cost.py, and what it was measured on."""
    rows = [
        [
            f"{row.change}: {found.source}, {found.width}x{found.height}, {row.engine}, {row.precision}",
            _shares(row.plain_seconds, row.changed_seconds),
            f"{median(row.plain_seconds):.3f}",
        ]
        for found in results
        for row in found.beside
    ]
    notes = dict.fromkeys(measured(found) for found in results)
    return "\n\n".join([table(["change", "UNet, with ÷ without", "UNet without, s"], rows), *notes]) + "\n"


def compiled(of: Result) -> str:
    """Return the table of inspect_engines.py: two rows for each graph, and what it was made with."""
    rows = [["graph", "form", "layers", "fused attentions", "fp32 inside", "MB", "kinds of layers"]]
    for one in of.compiled:
        for form, counted in (("as in the bundle", one.as_in_bundle), ("rewritten", one.rewritten)):
            numbers = (counted.layers, counted.fused_attentions, counted.fp32_inside)
            kinds = ", ".join(f"{count} {kind}" for kind, count in counted.kinds.items())
            size = f"{counted.engine_bytes / 1e6:.0f}"
            rows.append([f"{one.graph}, {one.precision}", form, *map(str, numbers), size, kinds])
    last = of.runs[of.compiled[-1].run]
    library = next(f"{name} {version}" for name, version in last.versions.items() if name.startswith("tensorrt"))
    what = f"{of.source}, {of.width}x{of.height}, for {of.compiled[-1].architecture}: {library}, commit {last.commit}"
    return f"{table(rows[0], rows[1:])}\n\n{what}.\n"


def _psnr(value: float) -> str:
    return "equal" if value >= EQUAL else f"{value:.1f}"


def _memory(of: Figures, gpu: bool) -> str:
    size = of.gpu_memory_bytes if gpu else of.peak_rss_bytes
    return "" if size is None else f"{size / GiB:.1f}"


def number(value: float) -> str:
    """Return three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
