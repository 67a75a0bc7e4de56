"""The tables of what is measured beside the pairs: variants, builds, the server, adapters, TensorRT's engines."""

from collections.abc import Sequence
from statistics import median

from result import Result
from rows import Build, Tried
from tables import GiB, measured, table

SWAP_MS = 50
"""The most that a change between two adapters of SD-Turbo at 512x512 may take with slots of rank 32, in ms."""
SLOTS_SHARE = {"fp32": 1.08, "bf16": 1.12}
"""Precision → the most that SD-Turbo's UNet at 512x512 may take with slots of rank 32, as a multiple of the one
without."""
OWN_MS = 5
"""The most that the server may add to a picture's encoding, in ms."""


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
            most: float | None = None
            swap = f"{row.swap.p50 * 1e3:.1f} ({row.swap.p90 * 1e3:.1f})"
            if found.source.endswith("sd-turbo") and (found.width, found.height, row.rank) == (512, 512, 32):
                most = SLOTS_SHARE.get(row.precision)
                swap += f"; at most {SWAP_MS}: {'passed' if row.swap.p50 * 1e3 <= SWAP_MS else '**missed**'}"
            what = f"{found.source}, {found.width}x{found.height}, {row.engine}, {row.precision}, rank {row.rank}"
            rows.append([
                what,
                _shares(row.plain_seconds, row.slots_seconds, most),
                f"{median(row.plain_seconds):.3f}",
                swap,
                f"{median(row.load_seconds) * 1e3:.0f}",
                f"{(row.rss_after - row.rss_before) / 2**20:+.1f} MiB over {row.swaps}",
                {True: "yes", False: "**no**", None: "not tried"}[row.equal_bits],
            ])  # fmt: skip
    notes = dict.fromkeys(measured(found) for found in results)
    return "\n\n".join([table([*heading, "equal states, equal bits"], rows), "A swap: p50 (p90).", *notes]) + "\n"


def _shares(plain: Sequence[float], changed: Sequence[float], most: float | None = None) -> str:
    """Return the rounds' median ratio with the extremes, and whether it is within the bar."""
    ratios = sorted(b / a for a, b in zip(plain, changed, strict=True))
    found = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), n = {len(ratios)}"
    return found + ("" if most is None else f"; at most {most}: {'passed' if median(ratios) <= most else '**missed**'}")


def beside(results: Sequence[Result]) -> str:
    """Return the table of unet_cost.py and web_attention.py, and what it was measured on."""
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
