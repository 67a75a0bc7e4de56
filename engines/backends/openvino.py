"""OpenVINO: a graph is loaded from the bundle, and compiled in memory. The ranges for int8 are written."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from turbochain.engines.backends.contract import Builder, Compilation, Option, Options, Progress
from turbochain.runtime.backends import openvino, openvino_model
from turbochain.runtime.bundle import writing
from turbochain.runtime.bundle.manifest import REFERENCE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.errors import InputError

AUTO = "auto"
FASTEST_FIRST = ("bf16", "mixed", "fp32")
OPTIONS = {
    "inference_precision": Option(
        AUTO,
        "what it computes in, even if the graphs are more precise; mixed is bf16 for the VAE and fp32 for the rest; "
        "auto is the first of bf16, mixed and fp32 that is within its bounds, fp32 if the CPU has no bf16 or with "
        "--precision fp32",
        choices=(AUTO, *FASTEST_FIRST),
    ),
    "vae_int8": Option(
        False,
        "the convolutions of the VAE's decoder in int8, their ranges measured on the bundle's reference prompts: "
        "faster, and with wider bounds (PSNR 30 dB)",
    ),
}


def settle(options: Options) -> dict[str, Any]:
    """Return the options with what this machine decides; InputError if it lacks what they ask for."""
    wanted = options["inference_precision"]
    if wanted == "fp32" or openvino.has_bf16():
        return dict(options)
    if wanted != AUTO:
        raise InputError(f"inference_precision={wanted}: this CPU does not compute in bf16; auto takes fp32 here")
    return {**options, "inference_precision": "fp32"}


def candidates(options: Options) -> list[dict[str, Any]]:
    """Return the precisions to try, in this order."""
    chosen = options["inference_precision"]
    return [{"inference_precision": p} for p in (FASTEST_FIRST if chosen == AUTO else (chosen,))]


def of_precision(precision: str) -> dict[str, Any]:
    """Return the options of a build in this precision: who asks for fp32 wants all of it in fp32."""
    return {"inference_precision": precision} if precision == "fp32" else {}


def compile(compilation: Compilation) -> list[str]:
    """Write the ranges of a graph in int8, and nothing for another; returns the file's name, if it is one."""
    if not openvino.in_int8(compilation.bundle.manifest.graphs[compilation.graph], compilation.options):
        return []
    file = openvino.ranges_file(compilation.graph)
    ranges = measure_ranges(compilation.bundle, compilation.graph, compilation.progress)
    writing.write_atomically(compilation.folder / file, json.dumps(ranges, indent=0) + "\n")
    return [file]


BUILDER = Builder(
    name="openvino",
    reads_graphs=True,
    options=OPTIONS,
    compile=compile,
    settle=settle,
    candidates=candidates,
    of_precision=of_precision,
)


def measure_ranges(bundle: Bundle, name: str, progress: Progress) -> dict[str, list[float]]:
    """Return convolution → the least and the greatest value that it reads, over all recorded runs of the graph."""
    library, graph = openvino.library(), bundle.manifest.graphs[name]
    ops = library.opset13
    model = openvino.core().read_model(bundle.plain(name) / graph.file)
    openvino_model.prepare(model)
    found = openvino_model.convolutions(model)
    axes = ops.constant(np.arange(4))
    reads = [op.input_value(0) for op in found.values()]
    ends = [reduce(value, axes, False) for value in reads for reduce in (ops.reduce_min, ops.reduce_max)]
    watched = library.Model([end.output(0) for end in ends], model.get_parameters())
    request = openvino.core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    seen, runs = [], list(_recorded(bundle, name))
    for i, feeds in enumerate(runs):
        progress(i, len(runs))
        made = request.infer([feeds[t.name] for t in graph.inputs])
        seen.append([float(made[i]) for i in range(len(ends))])
    lows, highs = np.min(seen, 0)[::2], np.max(seen, 0)[1::2]
    return {op: [low, high] for op, low, high in zip(found, lows.tolist(), highs.tolist(), strict=True)}


def _recorded(bundle: Bundle, graph_name: str) -> Iterator[dict[str, np.ndarray]]:
    """Find what diffusers fed to the graph in the recorded cases of every chain, by the names of its inputs."""
    bundle.check_files([REFERENCE])
    for chain in map(bundle.open_chain, bundle.manifest.chains):
        stages = [s for s in chain.chain.stages if s.graph == graph_name]
        for case in reference.read(bundle, chain.name).cases if stages else ():
            recorded = Recorded(chain, case)
            for stage in (s for s in stages if s.runs(case.modes)):
                for row in recorded.rows_of(stage):
                    named = ((t.name, stage.wires.get(t.name, t.name)) for t in chain.graphs[graph_name].inputs)
                    yield {own: recorded.value(name, row) for own, name in named}
