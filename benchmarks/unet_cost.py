"""What should cost a UNet nothing: a ControlNet that no call uses, an adapter in its weights; writes a results file.

    build-engine synthetic:sd-turbo -o plain.bundle
    build-engine synthetic:sd-turbo -o x.bundle --controlnet canny=FOLDER
    python benchmarks/unet_cost.py plain.bundle --controlled x.bundle
    python benchmarks/unet_cost.py plain.bundle --patched --backend onnxruntime

Two pipelines are loaded and draw the same picture in turn; which one begins changes with each round.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import cost_tables
import machine
import result
from adapter_cost import unet_seconds, write
from rows import Beside
from turbochain.runtime import Pipeline
from turbochain.runtime.backends import precisions
from turbochain.runtime.bundle.names import shapes

UNUSED, PATCHED = "ControlNet, unused", "adapter, patched"


def write_adapter(pipe: Pipeline, path: Path, rank: int) -> Path:
    """Write a random adapter for every matrix in the UNet's transformer blocks, in our own form."""
    numbers, tensors = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, shape in shapes(pipe.bundle)["unet"].items():
        if ".transformer_blocks." in name and len(shape) == 2:
            tensors[f"unet/{name}/down"] = numbers.standard_normal((rank, shape[1]), np.float32)
            tensors[f"unet/{name}/up"] = 1e-3 * numbers.standard_normal((shape[0], rank), np.float32)
    save_file(tensors, path)
    return path


def measure(plain: Pipeline, changed: Pipeline, change: str, chain: str, rounds: int, steps: int | None) -> Beside:
    """Let both draw in turn, and return the seconds of their UNets."""
    seconds: dict[Pipeline, list[float]] = {plain: [], changed: []}
    for round in range(rounds + 1):  # the first one warms up
        for pipe in (plain, changed) if round % 2 else (changed, plain):
            taken = unet_seconds(pipe, chain, steps)
            if round:
                seconds[pipe].append(taken)
    opened, made = plain.bundle.open_chain(chain), plain.bundle.engines()[plain.engine_name]
    graph = next(name for name, graph in opened.graphs.items() if graph.role == "unet")
    return Beside(
        change=change,
        engine=plain.engine_name,
        precision=precisions(made.key.backend, made.options, opened.graphs)[graph],
        plain_seconds=tuple(seconds[plain]),
        changed_seconds=tuple(seconds[changed]),
    )


def main() -> None:
    """Measure, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="the plain one")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--controlled", metavar="BUNDLE", help="one of the same checkpoint, built with --controlnet")
    what.add_argument("--patched", action="store_true", help="the same one with an adapter: ONNX Runtime, CPU, fp32")
    parser.add_argument("--chain", default="text-to-image", help="default text-to-image")
    parser.add_argument("--backend", help="default: the best engine that the bundle has for this machine")
    parser.add_argument("--device", help="default: the backend's own choice")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter (default 32)")
    parser.add_argument("--steps", type=int, help="step count (default: the fewest)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--commit", help="if git cannot say it")
    parser.add_argument("--results", type=Path, default=result.FOLDER, help="folder of the results file")
    given = parser.parse_args()
    where = {name: getattr(given, name) for name in ("backend", "device", "chain")}
    with ExitStack() as stack:
        plain = stack.enter_context(Pipeline.load(given.bundle, **where))
        other, how = given.controlled or given.bundle, {"lora": "patch"} if given.patched else {}
        changed = stack.enter_context(Pipeline.load(other, **where, **how))
        checkpoints = {pipe.bundle.manifest.checkpoint.source for pipe in (plain, changed)}
        sizes = {pipe.bundle.open_chain(given.chain).size for pipe in (plain, changed)}
        if len(checkpoints) > 1 or len(sizes) > 1:
            parser.error(f"bundles of one checkpoint and size were expected, and these are of {checkpoints}, {sizes}")
        device = plain.device.kind
        run = machine.run(device, known_commit=given.commit)
        if given.patched:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            changed.load_lora_weights(write_adapter(changed, Path(folder) / "x.safetensors", given.rank))
        change = PATCHED if given.patched else UNUSED
        row = measure(plain, changed, change, given.chain, given.rounds, given.steps)
    ((height, width),), (source,) = sizes, checkpoints
    found, path = write(row, run, source, (width, height), device, given.results, f"{change}-{row.engine}")
    print(cost_tables.beside([found]), path, sep="\n")


if __name__ == "__main__":
    main()
