"""Show how TensorRT compiled each graph, for developers: `make inspect-engines BUNDLE=sd-turbo.bundle`.

If the bundle has a TensorRT engine that fits this machine, polygraphy runs each graph's serialized engine and the graph
itself on ONNX Runtime's CPU provider, both with ONNX Runtime's results of the stages before, and the layers are those
of the serialized engine. Otherwise TensorRT-RTX builds each graph again, without installing it: as it is in the bundle,
and in the form that build-engine gives it; the layers are those that its builder logs. `--layers` lists them all, not
only the counts; `--results FOLDER` keeps the counts.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import machine
import result
from rows import Compiled, EngineContent
from turbochain.engines import options
from turbochain.engines.backends import tensorrt
from turbochain.export.phases.bar import Phase
from turbochain.runtime import backends, selection
from turbochain.runtime.backends.tensorrt import engine_file, logger, target, trt
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.checks import metrics, reference
from turbochain.runtime.checks.recorded import Recorded
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: on a GPU one kernel, or a few."""

    name: str
    kind: str
    writes: dict[str, str]  # tensor → type


@dataclass(frozen=True)
class Engine:
    """What TensorRT compiled of a graph."""

    layers: tuple[Layer, ...]
    size: int  # bytes
    ends: frozenset[str]  # the graph's outputs

    def counted(self) -> EngineContent:
        """Count what matters in it."""
        wide = [x for x in self.layers if x.writes and all(re.search("Float|FP32", of) for of in x.writes.values())]
        return EngineContent(
            layers=len(self.layers),
            fused_attentions=sum("mha" in layer.name for layer in self.layers),
            fp32_inside=sum(self.ends.isdisjoint(layer.writes) for layer in wide),
            kinds=dict(Counter(layer.kind for layer in self.layers).most_common()),
            engine_bytes=self.size,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status (see console.run)."""
    parser = argparse.ArgumentParser("inspect_engines", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="sm89", help="if no engine fits: build for these GPUs (default sm89)")
    parser.add_argument("--graph", action="append", help="only this one; may be repeated")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--results", type=Path, help="if no engine fits: write the counts into this folder")
    return console.run(parser, _inspect, argv)


def _inspect(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.bundle)
    bundle.check_files()
    graphs = bundle.manifest.graphs
    if unknown := set(arguments.graph or ()) - set(graphs):
        raise InputError(f"there is no graph {', '.join(unknown)}: choose from {', '.join(graphs)}")
    names = [g for g in graphs if g in (arguments.graph or graphs)]
    try:
        found = selection.select(bundle.open_chain(), "tensorrt")
    except InputError as reason:
        print(f"nothing is compared: {reason}", file=sys.stderr)
        plain = {name: built(bundle, name, arguments.target, rewrite=False) for name in names}
        engines = {name: built(bundle, name, arguments.target) for name in names}
        if arguments.results:
            _keep(bundle, arguments.target, plain, engines, arguments.results)
    else:
        files = {name: found.folder / engine_file(name) for name in found.engine.graphs}
        chains = [c for c in map(bundle.open_chain, bundle.manifest.chains) if not selection.lacks(c, found.engine)]
        print(console.table(comparison(chains, lambda name: engine_runner(files[name]))) + "\n")
        plain, engines = {}, {name: loaded(bundle, name, files[name]) for name in names if name in files}
    print(console.table(summary(plain, engines)))
    if arguments.layers:
        for name, engine in engines.items():
            found = [[layer.name, layer.kind, ", ".join(layer.writes.values())] for layer in engine.layers]
            print("\n" + console.table([[name, "type", "writes"], *found], left=3))


def summary(plain: Mapping[str, Engine], engines: Mapping[str, Engine]) -> list[list[str]]:
    """Return a row per graph: the counts of layers, fused attentions, tensors in fp32, and each type of layer."""
    rows = [["graph", "layers", "fused attentions", "fp32 inside", "types"]]
    for graph, engine in engines.items():
        for name, of in ((graph, engine), (f"{graph}, as in the bundle", plain.get(graph))):
            if of:
                counted = of.counted()
                kinds = ", ".join(f"{count} {kind}" for kind, count in counted.kinds.items())
                rows.append([name, *map(str, (counted.layers, counted.fused_attentions, counted.fp32_inside)), kinds])
    return rows


def built(bundle: Bundle, name: str, architecture: str, *, rewrite: bool = True) -> Engine:
    """Build a graph with TensorRT-RTX for an architecture such as "sm89", and return what its builder logs."""
    said: list[str] = []
    graph = bundle.manifest.graphs[name]
    path, chosen = bundle.plain(name) / graph.file, options.resolve("tensorrt", {"rewrite": rewrite})
    with Phase(f"build {name}" + ("" if rewrite else ", as it is")) as phase:
        serialized = tensorrt.serialize(
            path, name, chosen, target(architecture), path.parent, phase, lambda _, text: said.append(text)
        )
    return Engine(logged("\n".join(said)), serialized.nbytes, frozenset(t.name for t in graph.outputs))


def logged(said: str) -> tuple[Layer, ...]:
    """Return the layers of an engine, of all that its builder said."""
    found = re.findall(r"^Name: ([^,]+), LayerType: (\w+), .*?Outputs: \[(.*?)\], TacticName", said, re.M)
    written = re.compile(r"\{ Name: ([^,]+),.*?Datatype: (\w+)")
    return tuple(Layer(layer, kind, dict(written.findall(outputs))) for layer, kind, outputs in found)


def loaded(bundle: Bundle, name: str, path: Path) -> Engine:
    """Return a serialized engine for this machine's GPU."""
    engine = trt.Runtime(logger()).deserialize_cuda_engine(path.read_bytes())
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = [
        Layer(
            layer["Name"],
            layer["LayerType"],
            {o["Name"]: str(o.get("Datatype", o.get("Format/Datatype"))) for o in layer.get("Outputs", ())},
        )
        for layer in json.loads(text)["Layers"]
    ]
    return Engine(tuple(layers), path.stat().st_size, frozenset(t.name for t in bundle.manifest.graphs[name].outputs))


def _keep(
    bundle: Bundle, architecture: str, plain: Mapping[str, Engine], engines: Mapping[str, Engine], folder: Path
) -> None:
    """Write the counts of each graph's two forms into a results file, in place of older ones for the same graph."""
    chain, source = bundle.open_chain().chain, bundle.manifest.checkpoint.source
    height, width = chain.size
    path = folder / machine.file_name(source, width, height, what=f"engines {architecture}")
    rows = tuple(
        Compiled(
            graph=name,
            precision=bundle.manifest.graphs[name].precision,
            architecture=architecture,
            as_in_bundle=plain[name].counted(),
            rewritten=engine.counted(),
        )
        for name, engine in engines.items()
    )
    named = (word for name in engines for word in ("--graph", name))
    command = shlex.join(
        ["python", "benchmarks/inspect_engines.py", bundle.path.name, "--target", architecture, *named]
    )
    run = replace(machine.run(), command=command)
    made = result.Result(source, width, height, "cpu", prompt=None, seed=None, runs=(run,), compiled=rows)
    result.write(result.merge(result.read(path), made) if path.exists() else made, path)
    print(f"written to {path}", file=sys.stderr)


def comparison(chains: Sequence[OpenChain], runner: Callable[[str], Any]) -> list[list[str]]:
    """Return a row per graph and output: the error of `runner` against ONNX Runtime, both fed the latter's results.

    Each graph is compared once, in the first recorded case that runs it.
    """
    rows, seen = [["graph", "output", "relative L2", "largest difference", "largest value"]], set[str]()
    for chain in chains:
        for case in reference.read(chain.bundle, chain.name).cases:
            if {stage.graph for stage in chain.chain.stages if stage.runs(case.modes)} - seen:
                rows += _compared(Recorded(chain, case), runner, seen)
    return rows


def _compared(recorded: Recorded, runner: Callable[[str], Any], seen: set[str]) -> Iterator[list[str]]:
    """Run a case's first row, and compare the graphs that are not `seen`, which they are then."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    chain, known = recorded.chain, Feed()
    for stage in (stage for stage in chain.chain.stages if stage.runs(recorded.case.modes)):
        graph = chain.graphs[stage.graph]
        path = str(chain.bundle.path / graph.file)
        runners = [OnnxrtRunner(SessionFromOnnx(path, providers=["CPUExecutionProvider"]), name="onnxruntime")]
        runners += [] if stage.graph in seen else [runner(stage.graph)]
        seen.add(stage.graph)
        names = {t.name: stage.wires.get(t.name, t.name) for t in (*graph.inputs, *graph.outputs)}
        feed = {t.name: known.get(names[t.name], recorded.value(names[t.name], 0)) for t in graph.inputs}
        (_, (right,)), *others = Comparator.run(runners, data_loader=[feed])
        for t in graph.outputs:
            want = known[names[t.name]] = np.array(right[t.name])
            for got in (np.array(found[t.name]) for _, (found,) in others):
                error, most = metrics.relative_l2(got, want), metrics.max_abs(got, want)
                yield [stage.graph, t.name, f"{error:.3g}", f"{most:.3g}", f"{np.abs(want).max():.3g}"]


def engine_runner(path: Path) -> Any:
    """Return polygraphy's runner of a serialized engine."""
    if "rtx" in backends.require("tensorrt")[0]:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import EngineFromPath, TrtRunner

    return TrtRunner(EngineFromPath(str(path)), name="tensorrt")


if __name__ == "__main__":
    sys.exit(main())
