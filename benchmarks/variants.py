"""Variants of how OpenVINO runs a graph on a CPU, each interleaved with the backend's own way.

    python benchmarks/variants.py sd-turbo.bundle

The backend itself loads each variant, with a rewrite left out or a property added. Both run the same input A B A B.
Writes results/NAME.json.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cost_tables
import machine
import result
from figures import spread
from measure import say
from rows import Tried
from turbochain.engines import options as options_of
from turbochain.engines.backends import openvino as builder
from turbochain.runtime import Bundle
from turbochain.runtime.backends import openvino, openvino_model
from turbochain.runtime.backends.contract import Opened
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.commands import console


@dataclass(frozen=True)
class Variant:
    """A way to load a graph, by its difference from the backend's own, which is in bf16 if the CPU has it."""

    name: str
    without: tuple[Callable[[Any], object], ...] = ()  # of the backend's rewrites of a graph
    exact: bool = False  # in fp32
    properties: tuple[tuple[str, str], ...] = ()
    int8: bool = False
    cached: bool = False  # from OpenVINO's cache on disk, which an earlier load has filled


OWN, EXACT = Variant("the backend's own"), Variant("fp32", exact=True)
VARIANTS = (
    OWN,
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
    Variant("convolutions and linear layers in int8", int8=True),
)


def own_precision() -> str:
    """Return the precision that the backend computes in on this CPU."""
    return "bf16" if openvino.has_bf16() else "fp32"


class VariantGraph(openvino.OpenVino):
    """One graph, loaded by the backend as a variant, with random inputs."""

    def __init__(self, bundle: Bundle, name: str, variant: Variant, folder: Path) -> None:
        """Load the graph; `folder` is for OpenVINO's cache."""
        self.variant, self.graph, self.cache = variant, name, folder
        self.ends = bundle.manifest.graphs[name]
        self.rewrites = tuple(rewrite for rewrite in openvino_model.REWRITES if rewrite not in variant.without)
        precision = "fp32" if variant.exact else own_precision()
        chosen = {"int8": "all" if variant.int8 else "none", "inference_precision": precision}
        options, device = options_of.resolve("openvino", chosen), openvino.device(None)
        options |= builder.candidates(options)[0]
        super().__init__(Opened(bundle, folder, options, device))
        start = time.perf_counter()
        loaded = self.load_graph(name)
        self.load_seconds = time.perf_counter() - start
        self.arrays = {t.name: np.zeros(t.shape, t.dtype) for t in (*self.ends.inputs, *self.ends.outputs)}
        random = np.random.default_rng(0)
        for t in self.ends.inputs:
            if t.dtype == "float32":
                self.arrays[t.name][...] = random.standard_normal(t.shape)
        self.launch = loaded.bind(self.arrays)

    def properties(self, graph: Graph, model: Any) -> dict[str, str]:
        """Return the backend's properties with the variant's."""
        cache = {"CACHE_DIR": str(self.cache)} if self.variant.cached else {}
        return {**super().properties(graph, model), **dict(self.variant.properties), **cache}

    def run(self) -> float:
        """Launch the graph once, and return the seconds."""
        start = time.perf_counter()
        self.launch()
        return time.perf_counter() - start

    def output(self) -> np.ndarray:
        """Return the first output of the last run, as float64."""
        return self.arrays[self.ends.outputs[0].name].astype(np.float64)

    def close(self) -> None:
        """Give everything back."""
        del self.launch
        super().close()


def compare(bundle: Bundle, name: str, variants: Sequence[Variant], runs: int) -> list[Tried]:
    """Measure each variant, interleaved with the first."""
    own, *others = variants
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = _exact(bundle, name, folder)
        ours = VariantGraph(bundle, name, own, folder)
        ours.run()
        rows = [_row(ours, expected, seconds=0.0)]
        taken: list[float] = []
        for variant in others:
            say(f"{name}: {variant.name}")
            if variant.cached:
                VariantGraph(bundle, name, variant, folder).close()
            other = VariantGraph(bundle, name, variant, folder)
            other.run()
            rounds = np.array([(ours.run(), other.run()) for _ in range(runs)])
            taken += list(rounds[:, 0])
            row = _row(other, expected, float(np.median(rounds[:, 1])))
            rows.append(replace(row, ratio=spread(rounds[:, 0] / rounds[:, 1])))
            other.close()
        ours.close()
    return [replace(rows[0], seconds=float(np.median(taken))), *rows[1:]]


def _exact(bundle: Bundle, name: str, folder: Path) -> np.ndarray:
    exact = VariantGraph(bundle, name, EXACT, folder)
    exact.run()
    expected = exact.output()
    exact.close()
    return expected


def _row(loaded: VariantGraph, expected: np.ndarray, seconds: float) -> Tried:
    cached = loaded.variant.cached
    return Tried(
        graph=loaded.graph,
        variant=loaded.variant.name,
        precision=own_precision(),
        load_seconds=loaded.load_seconds,
        error=float(np.linalg.norm(loaded.output() - expected) / np.linalg.norm(expected)),
        seconds=seconds,
        cache_bytes=sum(p.stat().st_size for p in loaded.cache.rglob("*.blob")) if cached else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser("variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", nargs="+", default=["vae_decoder", "unet"])
    parser.add_argument("--runs", type=int, default=5, help="rounds of each variant (default 5)")
    parser.add_argument("--results", type=Path, default=result.FOLDER, help="where the results go")
    return console.run(parser, _variants, argv)


def _variants(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.bundle)
    rows: list[Tried] = []
    for graph in arguments.graphs:
        say(f"{graph}: the backend's own")
        rows += compare(bundle, graph, _variants_of(bundle, graph), arguments.runs)
    height, width = bundle.open_chain().size
    source = Path(bundle.manifest.checkpoint.source).name
    run = machine.run()
    found = result.Result(source, width, height, "cpu", None, None, runs=(run,), variants=tuple(rows))
    path = arguments.results / machine.file_name(source, width, height, what="variants")
    result.write(found, path)
    print(cost_tables.variants(found), path, sep="\n")


def _variants_of(bundle: Bundle, name: str) -> list[Variant]:
    """Return those that suit the graph and this CPU, the backend's own first."""
    int8 = bool(bundle.manifest.graphs[name].quantization)  # from the first build of an engine in int8
    return [v for v in VARIANTS if (int8 or not v.int8) and (openvino.has_bf16() or not v.exact)]


if __name__ == "__main__":
    sys.exit(main())
