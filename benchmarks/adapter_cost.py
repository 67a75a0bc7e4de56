"""What adapters cost in a bundle with slots: the UNet's seconds, a swap, a load, memory; writes a results file.

    build-engine synthetic:sd-turbo -o x.bundle --lora-rank 32
    python benchmarks/adapter_cost.py x.bundle

Rounds with and without two random adapters, which fill every slot, are interleaved. A swap ends at the first launch.
Then the same picture is drawn with one, the other, the first, none and none.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import save_file

import cost_tables
import machine
import result
from rows import Adapted, BenchmarkRun, Quantiles, Row
from turbochain.runtime import Cancelled, Pipeline
from turbochain.runtime.backends import precisions
from turbochain.runtime.bundle.names import shapes
from turbochain.runtime.chain.slots import ChainSlots
from turbochain.runtime.inputs.slots import read_layout

CALL = {"prompt": "a photo of a cat", "seed": 0, "output_type": "uint8"}


def write_adapter(pipe: Pipeline, chain: str, folder: Path, seed: int, rank: int) -> Path:
    """Write a random adapter of every parameter that has a slot, in our own form."""
    numbers, opened = np.random.default_rng(seed), pipe.bundle.open_chain(chain)
    slots, tensors = ChainSlots(opened), dict[str, np.ndarray]()
    for component, graph in slots.graphs(slots.modes[0]).items():
        for group in read_layout(pipe.bundle, graph).groups:
            for member in group.members:
                name = f"{component}/{member.parameter}"
                tensors[f"{name}/down"] = numbers.standard_normal((rank, group.in_), np.float32)
                tensors[f"{name}/up"] = 1e-3 * numbers.standard_normal((member.out, rank), np.float32)
    path = folder / f"{seed}.safetensors"
    save_file({n: _in_shape(pipe, n, t) for n, t in tensors.items()}, path)
    return path


def _in_shape(pipe: Pipeline, name: str, matrix: np.ndarray) -> np.ndarray:
    """Return a matrix in the shape that it has in a file: of a convolution with two axes more."""
    component, parameter, _ = name.split("/")
    more = len(shapes(pipe.bundle)[component][parameter]) - 2
    return matrix.reshape(*matrix.shape, *[1] * more)


def unet_seconds(pipe: Pipeline, chain: str, steps: int | None) -> float:
    """Draw a picture; return the mean seconds of a launch of the UNet."""
    seen: list[float] = []

    def observe(name: str, seconds: float) -> None:
        if pipe.bundle.manifest.graphs[name].role == "unet":
            seen.append(seconds)

    pipe(**CALL, chain=chain, num_inference_steps=steps, observe=observe)
    return float(np.mean(seen))


def host_seconds(pipe: Pipeline, chain: str, steps: int | None) -> float:
    """Return what a call takes up to its first launch."""
    start = time.perf_counter()
    try:
        pipe(**CALL, chain=chain, num_inference_steps=steps, cancel=lambda: True)
    except Cancelled:
        return time.perf_counter() - start
    raise AssertionError("the call was not cancelled")


def equal_states(pipe: Pipeline, chain: str, steps: int | None) -> bool:
    """Draw with a, b, a, none and none; return whether equal states gave equal bits, and others other ones."""
    made: dict[str, set[bytes]] = {}
    for state in ("a", "b", "a", "", ""):
        pipe.set_adapters([*state])
        drawn = pipe(**CALL | {"output_type": "latent"}, chain=chain, num_inference_steps=steps)
        made.setdefault(state, set()).add(np.asarray(drawn.images).tobytes())
    return all(len(found) == 1 for found in made.values()) and len(set().union(*made.values())) == len(made)


def measure(
    pipe: Pipeline, chain: str, rank: int | None, rounds: int, swaps: int, steps: int | None, apart: bool
) -> Adapted:
    """Measure calls with and without slots, interleaved; then swaps. `apart`: each call that counts follows one
    that does not, because its UNet was just loaded."""
    opened = pipe.bundle.open_chain(chain)
    slots, made = ChainSlots(opened), pipe.bundle.engines()[pipe.engine_name]
    first = slots.graphs(slots.modes[0])["unet"]
    rank = rank or read_layout(pipe.bundle, first).rank
    plain, slotted, loads, unchanged, changed = ([] for _ in range(5))

    def drawn() -> float:
        if apart:
            unet_seconds(pipe, chain, steps)
        return unet_seconds(pipe, chain, steps)

    with tempfile.TemporaryDirectory() as folder:
        files = {n: write_adapter(pipe, chain, Path(folder), i, rank) for i, n in enumerate("ab")}
        for round in range(rounds + 1):  # the first one warms up
            pipe.unload_lora_weights()
            seconds = [drawn()]
            for name, file in files.items():
                start = time.perf_counter()
                pipe.load_lora_weights(file, adapter_name=name)
                seconds.append(time.perf_counter() - start)
            pipe.set_adapters("a")
            seconds.append(drawn())
            if round:
                plain.append(seconds[0])
                loads += seconds[1:3]
                slotted.append(seconds[3])
        for i in range(20 + swaps):
            if i == 20:
                before = _rss()
            start = time.perf_counter()
            pipe.set_adapters("ba"[i % 2])
            seconds_of_set = time.perf_counter() - start
            swap = seconds_of_set + host_seconds(pipe, chain, steps)
            if i >= 20:
                changed.append(swap)
                unchanged.append(host_seconds(pipe, chain, steps))
        after = _rss()
        equal = equal_states(pipe, chain, steps)
        pipe.unload_lora_weights()
    return Adapted(
        engine=pipe.engine_name,
        graph=first,
        precision=precisions(made.key.backend, made.options, opened.graphs)[first],
        rank=rank,
        matrices=sum(len(group.members) for group in read_layout(pipe.bundle, first).groups),
        plain_seconds=tuple(plain),
        slots_seconds=tuple(slotted),
        load_seconds=tuple(loads),
        swap=_quantiles(np.array(changed) - np.median(unchanged)),
        before_a_launch=_quantiles(np.array(unchanged)),
        swaps=swaps,
        rss_before=before,
        rss_after=after,
        equal_bits=equal,
    )


def _rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _quantiles(seconds: np.ndarray) -> Quantiles:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Quantiles(p50, p90, p99)


def write(
    row: Row, run: BenchmarkRun, source: str, size: tuple[int, int], device: str, folder: Path, what: str
) -> tuple[result.Result, Path]:
    """Write the results file of one row, and return its content and path. `size`: width, height."""
    found = result.Result(source, *size, machine.device_name(device), prompt=CALL["prompt"], seed=0, runs=(run,))
    found, path = found.add(row), folder / machine.file_name(source, *size, device, what)
    result.write(found, path)
    return found, path


def main() -> None:
    """Measure, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="one that was built with --lora-rank")
    parser.add_argument("--chain", default="text-to-image", help="default text-to-image")
    parser.add_argument("--backend", help="default: the best engine that the bundle has for this machine")
    parser.add_argument("--engine", help="the one of this folder name")
    parser.add_argument("--device", help="default: the backend's own choice")
    parser.add_argument("--rank", type=int, help="of the adapters (default: that of the smallest slots)")
    parser.add_argument("--steps", type=int, help="step count (default: the fewest)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--swaps", type=int, default=100, help="default 100")
    parser.add_argument("--apart", action="store_true", help="keep only one of the two UNets in memory")
    parser.add_argument("--commit", help="if git cannot say it")
    parser.add_argument("--results", type=Path, default=result.FOLDER, help="folder of the results file")
    given = parser.parse_args()
    where = {name: getattr(given, name) for name in ("backend", "engine", "device", "chain")}
    with Pipeline.load(given.bundle, keep_all=not given.apart, **where) as pipe:
        device = pipe.device.kind
        run = machine.run(device, known_commit=given.commit)
        row = measure(pipe, given.chain, given.rank, given.rounds, given.swaps, given.steps, given.apart)
        height, width = pipe.bundle.open_chain(given.chain).size
        source = pipe.bundle.manifest.checkpoint.source
    found, path = write(row, run, source, (width, height), device, given.results, f"adapters-{row.engine}")
    print(cost_tables.adapted([found]), path, sep="\n")


if __name__ == "__main__":
    main()
