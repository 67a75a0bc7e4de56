"""Measure what int8 needs to know of a graph, on what diffusers fed to it, and write it into the bundle.

It is done once, for the first engine in int8, and needs neither torch nor the checkpoint.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.engines.backends.contract import Progress
from turbochain.export.phases.phases import Phases, versions
from turbochain.runtime import backends
from turbochain.runtime.backends import openvino, openvino_model
from turbochain.runtime.bundle import hashing, quantization, strict_json, writing
from turbochain.runtime.bundle.manifest import REFERENCE, Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.quantization import Product, Quantization, Range, Rounding
from turbochain.runtime.checks import reference
from turbochain.runtime.checks.metrics import relative_l2
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.errors import BackendMissing, InputError
from turbochain.runtime.selection import folder_to_write

JOB = "turbochain.engines.calibration:calibrate"
SINCE = "0.1.0"
"""The first turbochain that reads what is written here."""

SPLITS = 20
"""Of groups of roundings, in search of those that cost most; each takes two runs of the graph."""

Feeds = Mapping[str, np.ndarray]


def describe(phases: Phases, bundle: Bundle, graphs: Sequence[str]) -> Bundle:
    """Return the bundle, whose folder is locked, with a description of these graphs for int8: measured if it has none.

    Raises InputError if the bundle cannot be written, BackendMissing without OpenVINO, which measures.
    """
    for name in graphs:
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
    """Return the description of a graph: the ranges over all recorded runs, and what each rounding costs in the first.

    int8 is imitated in fp32, so that the figures are those of no machine.
    """
    graph, runs = bundle.manifest.graphs[name], list(recorded(bundle, name))
    path, steps = bundle.plain(name) / graph.file, itertools.count()

    def tick() -> None:
        progress(min(next(steps), total), total)

    total = len(runs) + 3 + 2 * SPLITS  # runs of the graph
    ranges = _ranges(graph, path, runs, tick)
    roundings = [Rounding(*of) for of in zip(ranges, _errors(graph, path, runs[0], ranges, tick), strict=True)]
    found = openvino_model.products(openvino.core().read_model(path))
    reads, makes = roundings[: len(found)], roundings[len(found) :]
    products = {n: Product(*of, _macs(op)) for (n, op), *of in zip(found.items(), reads, makes, strict=True)}
    return Quantization(products, len(runs), versions("turbochain", "openvino", "numpy"))


def _ranges(graph: Graph, path: Path, runs: Sequence[Feeds], tick: Callable[[], None]) -> list[Range]:
    """Return the ranges of `_ends` over these runs."""
    model = openvino.core().read_model(path)
    run = _compile(graph, _extremes(model), model.get_parameters())
    seen = []
    for feeds in runs:
        tick()
        seen.append([float(end) for end in run(feeds)])
    extremes = np.array(seen).reshape(len(runs), -1, 2)  # [runs, ends, low and high]
    lows, highs = extremes[..., 0].min(0).tolist(), extremes[..., 1].max(0).tolist()
    return [Range(low, high) for low, high in zip(lows, highs, strict=True)]


def _errors(graph: Graph, path: Path, feeds: Feeds, ranges: Sequence[Range], tick: Callable[[], None]) -> list[float]:
    """Return the relative L2 that rounding each of `_ends` to its range adds to the results of one run."""
    model = openvino.core().read_model(path)
    run = _compile(graph, model.outputs, [*model.get_parameters(), _switch(model, ranges)])

    def make(rounded: Sequence[int]) -> np.ndarray:
        tick()
        switches = np.isin(np.arange(len(ranges)), rounded).astype(np.float32)
        return np.concatenate([end.ravel().astype(np.float64) for end in run(feeds, switches)])

    exact, half = make([]), len(ranges) // 2
    inputs, results = range(half), range(half, 2 * half)
    found = share(lambda rounded: relative_l2(make(rounded), exact), [inputs, results])
    return [found[i] for i in range(len(ranges))]


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
    return {i: round(value / math.sqrt(len(group)), 6) for value, group in found for i in group}


def _compile(graph: Graph, results: Sequence[Any], parameters: Sequence[Any]) -> Callable[..., list[np.ndarray]]:
    """Return a function that runs a model of a graph: of its inputs by name, and of others."""
    model = openvino.library().Model(list(results), list(parameters))
    request = openvino.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(feeds: Feeds, *more: np.ndarray) -> list[np.ndarray]:
        made = request.infer([*(feeds[t.name] for t in graph.inputs), *more])
        return [made[i] for i in range(len(made))]

    return run


def _macs(op: Any) -> int:
    """Return the multiplications of a product."""
    outputs = op.input_value(1).shape[0 if op.get_type_name() == "Convolution" else -1]
    return math.prod(op.output(0).shape) * math.prod(op.input_value(1).shape) // int(outputs)


def _ends(model: Any) -> list[Any]:
    """Return the inputs of all products, then the results of all."""
    found = openvino_model.products(model).values()
    return [op.input_value(0) for op in found] + [openvino_model.result(op).output(0) for op in found]


def _extremes(model: Any) -> list[Any]:
    """Add operators that make the least and the greatest value of each of `_ends`; return those in this order."""
    ops, made = openvino.library().opset13, []
    for end in _ends(model):
        axes = ops.constant(np.arange(len(end.shape)))
        made += [reduce(end, axes, False).output(0) for reduce in (ops.reduce_min, ops.reduce_max)]
    return made


def _switch(model: Any, ranges: Sequence[Range]) -> Any:
    """Let every product's input and result be rounded if a switch, of a new input of the model, is 1; return that."""
    ops = openvino.library().opset13
    switches = ops.parameter([len(ranges)], np.float32, name="switches")
    found = openvino_model.products(model).values()
    readers = [[op.input(0)] for op in found]
    readers += [list(openvino_model.result(op).output(0).get_target_inputs()) for op in found]
    for i in reversed(range(len(ranges))):  # results first: what reads one reads it as it is then
        end = readers[i][0].get_source_output()
        on = ops.convert(ops.gather(switches, ops.constant([i]), ops.constant(0)), end.get_element_type())
        error = ops.subtract(openvino_model.fake_quantize(end, ranges[i]), end)
        chosen = ops.add(end, ops.multiply(error, on))
        for reader in readers[i]:
            reader.replace_source_output(chosen.output(0))
    return switches


def recorded(bundle: Bundle, graph: str) -> Iterator[Feeds]:
    """Find what diffusers fed to the graph in the recorded cases of every chain, by the names of its inputs."""
    for chain in map(bundle.open_chain, bundle.manifest.chains):
        stages = [s for s in chain.chain.stages if s.graph == graph]
        for case in reference.read(bundle, chain.name).cases if stages else ():
            of_case = Recorded(chain, case)
            for stage in (s for s in stages if s.runs(case.modes)):
                last = of_case.table.rows - 1
                for row in range(last + 1) if stage.when == "step" else [last]:
                    named = ((t.name, stage.wires.get(t.name, t.name)) for t in chain.graphs[graph].inputs)
                    yield {own: of_case.value(name, row) for own, name in named}
