"""Measure what int8 needs to know of a graph, on what diffusers fed to it, and write it into the bundle.

It is done once, for the first engine in int8, and needs neither torch nor the checkpoint.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.engines.backends.contract import Progress
from turbochain.export.phases.phases import Phases, versions
from turbochain.runtime import backends
from turbochain.runtime.backends import openvino, openvino_int8
from turbochain.runtime.bundle import hashing, quantization, strict_json, writing
from turbochain.runtime.bundle.manifest import REFERENCE, Graph, Stage
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.quantization import Layer, Quantization, Range, Rounding
from turbochain.runtime.chain.slots import ChainSlots
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.metrics import relative_l2
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.errors import BackendMissing, BundleError, InputError
from turbochain.runtime.selection import folder_to_write

JOB = "turbochain.engines.calibration:calibrate"
SINCE = "0.1.0"
"""The first turbochain that reads what is written here."""

SPLITS = 20
"""Of groups of roundings, in search of those that cost most; each takes two runs of the graph."""

HEADROOM = 4
"""How far the range of a tensor reaches, as a multiple of what is recorded: other prompts make larger values, and what
is cut off shows more than coarser steps."""

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """A recorded run of a graph."""

    feeds: Feeds  # by the graph's names
    weight: float  # relative L2 of the picture, or of the latents, for each unit of that of what the run makes


def describe(phases: Phases, bundle: Bundle, names: Sequence[str]) -> Bundle:
    """Return the bundle, whose folder is locked, with a description of these graphs for int8: measured if it has none.

    Raises InputError if the bundle cannot be written, BackendMissing without OpenVINO, which measures.
    """
    for name in names:
        if bundle.manifest.graphs[name].quantization:
            continue
        if folder_to_write(bundle).parent != bundle.path:
            raise InputError(
                f"{bundle.path} does not say how {name} is computed in int8, and cannot be written: copy it, with "
                f"build-engine {bundle.path} -o COPY -O int8=all"
            )
        if backends.library("openvino") is None:
            raise BackendMissing("int8 needs OpenVINO to measure the graphs: pip install 'turbochain[int8]'")
        bundle.check_files([REFERENCE, *bundle.manifest.graphs[name].files])
        phases.run(f"calibrate {name}", JOB, path=str(bundle.path), name=name)
        bundle = _enter(bundle, name)
    return bundle


def _enter(bundle: Bundle, name: str) -> Bundle:
    """Enter a graph's description, which is written, into the manifest; return the bundle."""
    file, manifest = quantization.file_name(name), bundle.manifest
    changed = dataclasses.replace(
        manifest,
        requires={**manifest.requires, "quantization": SINCE},
        graphs={**manifest.graphs, name: dataclasses.replace(manifest.graphs[name], quantization=file)},
        files={**manifest.files, file: hashing.describe(bundle.path / file)},
    )
    writing.write_atomically(bundle.path / "bundle.json", strict_json.write(changed))
    return Bundle.open(bundle.path, trust_engines=bundle.trusts_engines)


def calibrate(progress: Progress, *, path: str, name: str) -> None:
    """Measure a graph of a bundle, whose files have been hashed, and write its description."""
    bundle = Bundle.open(path)
    found = measure(bundle, name, progress)
    writing.write_atomically(bundle.path / quantization.file_name(name), strict_json.write(found))


def measure(bundle: Bundle, name: str, progress: Progress) -> Quantization:
    """Return the description of a graph: the ranges for all recorded runs, and what each rounding costs in the one of
    the greatest weight.

    int8 is imitated in fp32, so that the figures are those of no machine. Raises BundleError if no run is recorded.
    """
    runs = list(recorded(bundle, name))
    if not runs:
        raise BundleError(f"{bundle.path} has no recorded run of {name} to measure int8 with: build the bundle again")
    graph, steps = bundle.manifest.graphs[name], itertools.count()
    path, total = bundle.plain(name) / graph.file, len(runs) + 4 + 2 * SPLITS

    def tick() -> None:
        progress(min(next(steps), total), total)

    found = openvino_int8.layers(openvino.core().read_model(path))
    ranges = _ranges(graph, path, runs, tick)
    heaviest = max(runs, key=lambda run: run.weight)
    errors = [round(error * heaviest.weight, 8) for error in _errors(graph, path, heaviest.feeds, ranges, tick)]
    inputs, weights, results = np.split(errors, [len(found), 2 * len(found)])
    roundings = (Rounding(*of) for of in zip(ranges, [*inputs.tolist(), *results.tolist()], strict=True))
    reads = {layer: next(roundings) for layer in found}
    makes = {layer: next(roundings) for layer, op in found.items() if _is_convolution(op)}
    layers = {
        layer: Layer(reads[layer], weight, makes.get(layer), _macs(op))
        for (layer, op), weight in zip(found.items(), weights.tolist(), strict=True)
    }
    return Quantization(layers, len(runs), versions("turbochain", "openvino", "numpy"))


def _ranges(graph: Graph, path: Path, runs: Sequence[Run], tick: Callable[[], None]) -> list[Range]:
    """Return the ranges of `_ends` over these runs, with `HEADROOM`."""
    model = openvino.core().read_model(path)
    make = _compile(graph, _extremes(model), model.get_parameters())
    seen = []
    for run in runs:
        tick()
        seen.append([float(end) for end in make(run.feeds)])
    extremes = np.array(seen).reshape(len(runs), -1, 2)  # [runs, ends, low and high]
    lows, highs = HEADROOM * extremes[..., 0].min(0), HEADROOM * extremes[..., 1].max(0)
    return [Range(*ends) for ends in zip(lows.tolist(), highs.tolist(), strict=True)]


def _errors(graph: Graph, path: Path, feeds: Feeds, ranges: Sequence[Range], tick: Callable[[], None]) -> list[float]:
    """Return the relative L2 that each rounding of `_switch` adds to the results of one run."""
    model = openvino.core().read_model(path)
    layers = len(openvino_int8.layers(model))
    switches, count = _switch(model, ranges)
    run = _compile(graph, model.outputs, [*model.get_parameters(), switches])

    def make(rounded: Sequence[int]) -> np.ndarray:
        tick()
        switched = np.isin(np.arange(count), rounded).astype(np.float32)
        return np.concatenate([end.ravel().astype(np.float64) for end in run(feeds, switched)])

    exact = make([])
    groups = [range(layers), range(layers, 2 * layers), range(2 * layers, count)]
    found = share(lambda rounded: relative_l2(make(rounded), exact), groups)
    return [found[i] for i in range(count)]


def share(error: Callable[[Sequence[int]], float], groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """Return what each member of the groups adds to an error, whose square is the sum of the members' squares.

    The group of the largest error is halved, `SPLITS` times: the members that matter are measured alone, and others
    get an equal share of their group's.
    """
    found = [(error(group), list(group)) for group in groups if group]
    for _ in range(SPLITS):
        several = [item for item in found if len(item[1]) > 1]
        if not several:
            break
        found.remove(largest := max(several))
        half = len(largest[1]) // 2
        found += [(error(part), part) for part in (largest[1][:half], largest[1][half:])]
    return {i: value / math.sqrt(len(group)) for value, group in found for i in group}


def _compile(graph: Graph, results: Sequence[Any], parameters: Sequence[Any]) -> Callable[..., list[np.ndarray]]:
    """Return a function that runs a model of a graph in fp32: of its inputs by name, and of others."""
    model = openvino.library().Model(list(results), list(parameters))
    request = openvino.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(feeds: Feeds, *more: np.ndarray) -> list[np.ndarray]:
        made = request.infer([*(feeds[t.name] for t in graph.inputs), *more])
        return [made[i] for i in range(len(made))]

    return run


def _is_convolution(op: Any) -> bool:
    return bool(op.get_type_name() == "Convolution")


def _macs(op: Any) -> int:
    """Return the multiplications of a layer."""
    outputs = op.input_value(1).shape[0] if _is_convolution(op) else op.output(0).shape[-1]
    return math.prod(op.output(0).shape) * math.prod(op.input_value(1).shape) // int(outputs)


def _ends(model: Any) -> list[Any]:
    """Return the inputs of all layers, then the results of the convolutions."""
    found = openvino_int8.layers(model).values()
    results = [openvino_int8.result(op).output(0) for op in found if _is_convolution(op)]
    return [op.input_value(0) for op in found] + results


def _extremes(model: Any) -> list[Any]:
    """Add operators that make the least and the greatest value of each of `_ends`; return those in this order."""
    ops, made = openvino.library().opset13, []
    for end in _ends(model):
        axes = ops.constant(np.arange(len(end.shape)))
        made += [reduce(end, axes, False).output(0) for reduce in (ops.reduce_min, ops.reduce_max)]
    return made


def _switch(model: Any, ranges: Sequence[Range]) -> tuple[Any, int]:
    """Let each layer's input, each weight and each convolution's result be rounded if its switch is 1.

    Return the switches, which are a new input of the model, in this order, and how many there are.
    """
    ops, layers = openvino.library().opset13, [*openvino_int8.layers(model).values()]
    results = [[*end.get_target_inputs()] for end in _ends(model)[len(layers) :]]
    ends = [[op.input(0)] for op in layers] + results
    tensors = [(of, partial(openvino_int8.fake_quantize, seen=seen)) for of, seen in zip(ends, ranges, strict=True)]
    weights = [([op.input(1)], partial(openvino_int8.round_weight, op=op, bits=8)) for op in layers]
    found = [*tensors[: len(layers)], *weights, *tensors[len(layers) :]]
    switches = ops.parameter([len(found)], np.float32, name="switches")
    for i, (readers, rounded) in reversed([*enumerate(found)]):  # results first: what reads one reads it as it is then
        end = readers[0].get_source_output()
        on = ops.convert(ops.gather(switches, ops.constant([i]), ops.constant(0)), end.get_element_type())
        chosen = ops.add(end, ops.multiply(ops.subtract(rounded(end), end), on))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    return switches, len(found)


def recorded(bundle: Bundle, name: str) -> Iterator[Run]:
    """Find the recorded runs of a graph in the cases of every chain, with zeros in its slots for adapters."""
    for chain in map(bundle.open_chain, bundle.manifest.chains):
        stages = [stage for stage in chain.chain.stages if stage.graph == name]
        cases = reference.read(bundle, chain.name).cases if stages else ()
        for case in (case for case in cases if not case.has_samples):  # else what a graph reads may be unknown
            for mode in ("", *ChainSlots(chain).modes):
                of_case = Recorded(chain, case, mode)
                for stage in (s for s in stages if s.runs(of_case.modes) and not (mode and s.runs(case.modes))):
                    for row, feeds in of_case.fed(stage):
                        yield Run(feeds, _weight(of_case, stage, row))


def _weight(case: Recorded, stage: Stage, row: int) -> float:
    """Return the weight of a run, see `Run`: what the sampler's row makes of a prediction, or 1 for the decoder."""
    if stage.judged != "prediction":
        return 1.0
    predictions, latents = case.rows("prediction"), case.rows("next_latents")
    rows = range(len(latents)) if case.chain.chain.stream else [row]
    made = [np.linalg.norm(case.table.v[i, 0] * predictions[i]) / np.linalg.norm(latents[i]) for i in rows]
    return float(max(made))
