"""What was tried to make OpenVINO quicker on a CPU: each variant by turns with the one that the backend uses.

    python benchmarks/variants.py sd-turbo.bundle

One variant after the other is loaded beside the backend's own, and both run the same input A B A B. Writes
benchmarks/results/NAME-variants-cpu-KIND.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cpu import say
from cpu_rows import spread
from measure import PACKAGES, commit, cpu_kind, machine
from turbochain.engines.backends.openvino import measure_ranges
from turbochain.export.phases.phases import versions
from turbochain.runtime import Bundle
from turbochain.runtime.backends import openvino, openvino_model
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.commands import console

HERE = Path(__file__).parent
INCLUDES = {
    "ratio": "seconds of the backend's own ÷ seconds of the variant, for each two runs that followed one another: "
    "above 1 the variant is quicker",
    "load": "the graph read, rewritten and compiled, in seconds; files are in the page cache",
    "error": "relative L2 of the first output against the backend's own in fp32, on the same random input",
}


@dataclass(frozen=True)
class Variant:
    """A way to load a graph: what differs from the backend's own, which is in bf16 where the CPU has it."""

    name: str
    without: tuple[Callable[[Any], object], ...] = ()  # of the backend's rewrites of a graph
    exact: bool = False  # in fp32
    properties: tuple[tuple[str, str], ...] = ()
    int8: bool = False
    cached: bool = False  # from OpenVINO's cache on disk, which an earlier load has filled


EXACT = Variant("fp32", exact=True)
VARIANTS = (
    Variant("the backend's own"),
    EXACT,
    Variant("normalisation as exported, a sum at a time", (openvino_model.fuse_group_norms,)),
    Variant("normalisation as OpenVINO's GroupNormalization", (openvino_model.split_group_norms,)),
    Variant("upsampling and its convolution apart", (openvino_model.merge_upsampling,)),
    Variant("attention and chains of small operations not fused", properties=(("SNIPPETS_MODE", "DISABLE"),)),
    Variant("one thread", properties=(("INFERENCE_NUM_THREADS", "1"),)),
    Variant("threads pinned to cores", properties=(("ENABLE_CPU_PINNING", "YES"),)),
    Variant("threads not pinned", properties=(("ENABLE_CPU_PINNING", "NO"),)),
    Variant("tuned for throughput", properties=(("PERFORMANCE_HINT", "THROUGHPUT"), ("NUM_STREAMS", "1"))),
    Variant("graph from OpenVINO's cache on disk", cached=True),
    Variant("convolutions in int8", int8=True),
)


def own_precision() -> str:
    """What the backend computes in on this CPU."""
    return "bf16" if openvino.has_bf16() else "fp32"


class Loaded:
    """A graph, compiled."""

    def __init__(self, bundle: Bundle, graph: str, variant: Variant, cache: str, seed: int = 0) -> None:
        core = openvino.library().Core()
        precision = "fp32" if variant.exact else own_precision()
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": openvino.HINTS[precision]}
        properties |= dict(variant.properties)
        if variant.cached:
            core.set_property({"CACHE_DIR": cache})
        ranges = measure_ranges(bundle, graph, lambda done, of: None) if variant.int8 else None
        start = time.perf_counter()
        model = core.read_model(bundle.path / bundle.manifest.graphs[graph].file)
        for rewrite in openvino_model.REWRITES:
            if rewrite not in variant.without:
                rewrite(model)
        model.validate_nodes_and_infer_types()
        if ranges is not None:
            openvino_model.quantize(model, ranges)
        self.request = core.compile_model(model, "CPU", properties).create_infer_request()
        self.load_seconds = time.perf_counter() - start
        random = np.random.default_rng(seed)
        self.feeds = [
            random.standard_normal(t.shape).astype(t.dtype) if t.dtype == "float32" else np.zeros(t.shape, t.dtype)
            for t in bundle.manifest.graphs[graph].inputs
        ]

    def run(self) -> float:
        """Once; its seconds."""
        start = time.perf_counter()
        self.request.infer(self.feeds)
        return time.perf_counter() - start

    def output(self) -> np.ndarray:
        """The first one, of the last run."""
        return np.array(self.request.get_output_tensor(0).data, np.float64)


def compare(bundle: Bundle, graph: str, variants: Sequence[Variant], runs: int) -> list[dict[str, Any]]:
    """Each variant by turns with the first of them."""
    own, *others = variants
    with tempfile.TemporaryDirectory() as cache:
        exact = Loaded(bundle, graph, EXACT, cache)
        exact.run()
        expected = exact.output()
        del exact
        ours = Loaded(bundle, graph, own, cache)
        ours.run()
        rows = [{"variant": own.name, "load_seconds": ours.load_seconds, "error": _error(ours.output(), expected)}]
        taken = []
        for variant in others:
            say(f"{graph}: {variant.name}")
            if variant.cached:
                del Loaded(bundle, graph, variant, cache).request
            other = Loaded(bundle, graph, variant, cache)
            other.run()
            pairs = np.array([(ours.run(), other.run()) for _ in range(runs)])
            taken += list(pairs[:, 0])
            rows.append({
                "variant": variant.name,
                "load_seconds": other.load_seconds,
                "error": _error(other.output(), expected),
                "seconds": float(np.median(pairs[:, 1])),
                "ratio": spread(pairs[:, 0] / pairs[:, 1]),
            })  # fmt: skip
            if variant.cached:
                rows[-1]["cache_bytes"] = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file())
        rows[0]["seconds"] = float(np.median(taken))
    return rows


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser("variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--graphs", nargs="+", default=["vae_decoder", "unet"])
    parser.add_argument("--runs", type=int, default=5, help="of each variant (default 5)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the results go")
    return console.run(parser, _variants, argv)


def _variants(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.bundle)
    found = {}
    for graph in arguments.graphs:
        say(f"{graph}: the backend's own")
        found[graph] = compare(bundle, graph, _variants_of(bundle, graph), arguments.runs)
    source, size = bundle.manifest.checkpoint.source, "x".join(map(str, bundle.size))
    result = {
        "what": f"{Path(source).name}, {size}",
        "precision": own_precision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(*PACKAGES, "openvino"),
        "includes": INCLUDES,
        "graphs": found,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{Path(source).name}-{size}-variants-cpu-{cpu_kind()}.json"
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    for graph, rows in found.items():
        print(console.table([["variant", "s", "speed", "error", "load s"], *map(_cells, rows)]), graph, "", sep="\n")


def _variants_of(bundle: Bundle, graph: str) -> list[Variant]:
    """Those that suit the graph and this CPU, the backend's own first."""
    int8 = bundle.manifest.graphs[graph].role == "vae_decoder"
    return [v for v in VARIANTS if (int8 or not v.int8) and (openvino.has_bf16() or not v.exact)]


def _cells(row: dict[str, Any]) -> list[str]:
    ratio = f"{row['ratio']['median']:.2f}" if "ratio" in row else "1"
    return [row["variant"], f"{row['seconds']:.2f}", ratio, f"{row['error']:.4f}", f"{row['load_seconds']:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
