"""OpenVINO: a stage is loaded from its graph, which compiles it in memory. What is written are the ranges for int8."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.engines.options import Option
from turbochain.runtime.backends import Device, openvino, openvino_model
from turbochain.runtime.bundle.manifest import REFERENCE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import reference
from turbochain.runtime.errors import InputError

READS_GRAPHS = True
AUTO = "auto"
FASTEST_FIRST = ("bf16", "mixed", "fp32")
OPTIONS = {
    "inference_precision": Option(
        AUTO,
        "what it computes in, whatever the graphs hold; mixed is bf16 for the VAE and fp32 for the rest; auto is the "
        "first of bf16, mixed and fp32 that is within its bounds, fp32 where the CPU has no bf16 or with "
        "--precision fp32",
        choices=(AUTO, *FASTEST_FIRST),
    ),
    "vae_int8": Option(
        False,
        "the VAE's convolutions in int8, its ranges measured on the bundle's reference prompts: faster, and with "
        "wider bounds (PSNR 30 dB)",
    ),
}
"""The options that an engine is built with: part of its key."""


def settle(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what this machine decides; InputError where it lacks what they ask for."""
    asked = options["inference_precision"]
    if asked == "fp32" or openvino.has_bf16():
        return dict(options)
    if asked != AUTO:
        raise InputError(f"inference_precision={asked}: this CPU does not compute in bf16; auto takes fp32 here")
    return {**options, "inference_precision": "fp32"}


def candidates(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to try, in this order, for those options that the verification decides."""
    chosen = options["inference_precision"]
    return [{"inference_precision": p} for p in (FASTEST_FIRST if chosen == AUTO else (chosen,))]


def compile(
    bundle: Bundle,
    name: str,
    folder: Path,
    options: Mapping[str, Any],
    device: Device,
    cache: Path,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Write the ranges of a graph in int8 into `folder`; returns the file's name, if it is one."""
    if not openvino.in_int8(bundle.manifest.graphs[name], options):
        return []
    file = openvino.ranges_file(name)
    (folder / file).write_text(json.dumps(measure_ranges(bundle, name, progress), indent=0) + "\n")
    return [file]


def measure_ranges(bundle: Bundle, name: str, progress: Callable[[int, int], None]) -> dict[str, list[float]]:
    """Convolution → the least and the largest value that it reads, over the reference's latents."""
    library, graph = openvino.library(), bundle.manifest.graphs[name]
    ops = library.opset13
    model = openvino.core().read_model(bundle.path / graph.file)
    openvino_model.prepare(model)
    found = openvino_model.convolutions(model)
    axes = ops.constant(np.arange(4))
    reads = [op.input_value(0) for op in found.values()]
    ends = [reduce(value, axes, False) for value in reads for reduce in (ops.reduce_min, ops.reduce_max)]
    watched = library.Model([end.output(0) for end in ends], model.get_parameters())
    request = openvino.core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    bundle.check_files([REFERENCE])
    seen, cases = [], reference.read_cases(bundle)
    for i, case in enumerate(cases):
        progress(i, len(cases))
        made = request.infer([case.tensors[t.name][-1] for t in graph.inputs])
        seen.append([float(made[i]) for i in range(len(ends))])
    lows, highs = np.min(seen, 0)[::2], np.max(seen, 0)[1::2]
    return {op: [low, high] for op, low, high in zip(found, lows.tolist(), highs.tolist(), strict=True)}
