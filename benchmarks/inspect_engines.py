"""Show how TensorRT compiled each stage, for developers: `make inspect-engines BUNDLE=sd-turbo.bundle`.

If the bundle has a TensorRT engine that fits this machine, polygraphy runs each stage's serialized engine and the same
graph on ONNX Runtime's CPU provider, both with ONNX Runtime's results of the stages before, and the layers are those of
the serialized engine. Otherwise TensorRT-RTX builds each stage again, without installing it, and the layers are those
that its builder logs. `--layers` lists them all, not only the counts.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.engines import options
from turbochain.engines.backends import tensorrt
from turbochain.export.phases.bar import Phase
from turbochain.runtime import backends, selection
from turbochain.runtime.backends.tensorrt import engine_file, target, trt
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import metrics, reference
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError

Layers = list[tuple[str, str]]  # name, type
Feed = dict[str, np.ndarray]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status (see console.run)."""
    parser = argparse.ArgumentParser("inspect_engines", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="sm89", help="if no engine fits: build for these GPUs (default sm89)")
    parser.add_argument("--stage", action="append", help="only this one; may be repeated")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    return console.run(parser, _inspect, argv)


def _inspect(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.bundle)
    bundle.check_files()
    graphs = bundle.open_chain().graphs
    if unknown := set(arguments.stage or ()) - set(graphs):
        raise InputError(f"there is no stage {', '.join(unknown)}: choose from {', '.join(graphs)}")
    stages = [g for g in graphs if g in (arguments.stage or graphs)]
    try:
        folder = selection.select(bundle.open_chain(), "tensorrt").folder
    except InputError as reason:
        print(f"nothing is compared: {reason}", file=sys.stderr)
        layers = {stage: built_layers(bundle, stage, arguments.target) for stage in stages}
    else:
        print(console.table(comparison(bundle, lambda stage: engine_runner(folder / engine_file(stage)))) + "\n")
        layers = {stage: engine_layers(folder / engine_file(stage)) for stage in stages}
    print(console.table(summary(layers)))
    if arguments.layers:
        for stage, found in layers.items():
            print("\n" + console.table([[stage, "type"], *map(list, found)], left=2))


def summary(layers: dict[str, Layers]) -> list[list[str]]:
    """Return a row per stage: the counts of layers, fused attentions, and each type of layer."""
    rows = [["stage", "layers", "fused attentions", "types"]]
    for stage, found in layers.items():
        types = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for _, kind in found).most_common())
        rows.append([stage, str(len(found)), str(sum("mha" in name for name, _ in found)), types])
    return rows


def built_layers(bundle: Bundle, stage: str, architecture: str) -> Layers:
    """Build a stage with TensorRT-RTX for an architecture such as "sm89"; returns the layers that its builder logs."""
    said: list[str] = []
    path = bundle.path / bundle.manifest.graphs[stage].file
    chosen = options.resolve("tensorrt", {})
    with Phase(f"build {stage}") as phase:
        tensorrt.serialize(
            path, stage, chosen, target(architecture), path.parent, phase, lambda _, text: said.append(text)
        )
    return re.findall(r"^Name: ([^,]+), LayerType: (\w+)", "\n".join(said), re.M)


def engine_layers(path: Path) -> Layers:
    """Return the layers of a serialized engine for this machine's GPU."""
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(path.read_bytes())
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return [(layer["Name"], layer["LayerType"]) for layer in json.loads(text)["Layers"]]


def comparison(bundle: Bundle, runner: Callable[[str], Any]) -> list[list[str]]:
    """Return a row per stage and output: the error of `runner` against ONNX Runtime, both fed the latter's results."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    rows = [["stage", "output", "relative L2", "largest difference", "largest value"]]
    chain = bundle.open_chain()
    case = next(case for case in reference.read_cases(bundle, chain.name) if not case.modes)
    recorded = Recorded(chain, case)
    known: Feed = {}
    for place in (place for place in chain.chain.stages if place.runs(case.modes)):
        stage, graph = place.graph, chain.graphs[place.graph]
        path = str(bundle.path / graph.file)
        expected = OnnxrtRunner(SessionFromOnnx(path, providers=["CPUExecutionProvider"]), name="onnxruntime")
        names = {t.name: place.wires.get(t.name, t.name) for t in (*graph.inputs, *graph.outputs)}
        feed = {t.name: known.get(names[t.name], recorded.value(names[t.name], 0)) for t in graph.inputs}
        results = Comparator.run([expected, runner(stage)], data_loader=[feed])
        (_, (right,)), (_, (found,)) = results
        for t in graph.outputs:
            want, got = np.array(right[t.name]), np.array(found[t.name])
            known[names[t.name]] = want
            error, most = metrics.relative_l2(got, want), metrics.max_abs(got, want)
            rows.append([stage, t.name, f"{error:.3g}", f"{most:.3g}", f"{np.abs(want).max():.3g}"])
    return rows


def engine_runner(path: Path) -> Any:
    """Return polygraphy's runner of a serialized engine."""
    if "rtx" in backends.require("tensorrt")[0]:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import EngineFromPath, TrtRunner

    return TrtRunner(EngineFromPath(str(path)), name="tensorrt")


if __name__ == "__main__":
    sys.exit(main())
