"""The roofline floor of a bundle: what no implementation on a machine can be much quicker than.

    python benchmarks/floor.py sd-turbo.bundle

counts each graph's work (no GPU is needed); `ceilings` measures what the machine can do. A stage's floor is the larger
of operations ÷ matrix rate and bytes ÷ copy bandwidth, the chain's is the sum over its launches.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError

UNKNOWN = ("Attention", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "LSTM", "MatMulInteger", "RNN")
"""Operators whose multiplications are not counted here: a graph with one is refused, or its floor would be too low."""

HOW = (
    "per stage the larger of floating-point operations (Conv, MatMul and Gemm; a multiply-add is two) ÷ the measured "
    "fp16 matrix rate, whatever the stage's precision, and bytes (weights as stored, inputs, outputs, each once) ÷ "
    "the measured device-to-device copy bandwidth; summed over the chain's launches, without the copies to and from "
    "the host"
)
SECONDS = 0.5  # how long each product and copy is repeated: long enough for the clocks to settle
SECONDS_CPU = 0.1


@dataclass(frozen=True)
class Work:
    """What one launch of a graph cannot do without."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best."""

    matrix: float  # floating-point operations per second in a large matrix product, on a CPU also in a convolution
    copy: float  # bytes per second, those read plus those written
    dtype: str  # of the matrices
    matrices: dict[str, float]  # shape → rate; `matrix` is the largest
    copies: dict[str, float]  # bytes copied → bandwidth; `copy` is the largest

    def seconds(self, work: Work) -> float:
        """The floor of one launch."""
        return max(work.flops / self.matrix, work.bytes / self.copy)


def count(path: Path) -> Work:
    """The work of the ONNX graph in a file, whose weights are not read; InputError where it cannot be counted."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True).graph
    shapes: dict[str, tuple[int, ...]] = {i.name: tuple(i.dims) for i in graph.initializer}
    sizes = {i.name: math.prod(i.dims) * _item(i.data_type) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
        sizes[value.name] = math.prod(shapes[value.name]) * _item(kind.elem_type)
    flops, weights = 0, {i.name for i in graph.initializer}
    moved = {v.name: sizes[v.name] for v in (*graph.input, *graph.output)}
    for node in graph.node:
        flops += _flops(node, shapes, path)
        for i, name in enumerate(node.input):
            if name in weights:  # of a table, only the rows that are looked up
                size = sizes[node.output[0]] if node.op_type == "Gather" and i == 0 else sizes[name]
                moved[name] = max(moved.get(name, 0), min(size, sizes[name]))
    return Work(flops, sum(moved.values()))


def _item(data_type: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def _flops(node: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> int:
    if node.op_type in UNKNOWN:
        raise InputError(f"{path}: the operations of {node.op_type} ({node.name}) cannot be counted")
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    per_value = {
        "Conv": lambda: math.prod(second[1:]),  # the weight is [out, in ÷ groups, *kernel]
        "MatMul": lambda: first[-1],
        "Gemm": lambda: first[0 if transposed else 1],
    }
    return 2 * math.prod(out) * per_value[node.op_type]()


def work(bundle: Bundle) -> dict[str, Work]:
    """Graph of the text-to-image chain → its work, but for those that run at load."""
    graphs, chain = bundle.manifest.graphs, bundle.chain
    return {g: count(bundle.path / graphs[g].file) for g in chain.graphs if g not in chain.once}


def of(bundle: Bundle, steps: int, ceilings: Ceilings) -> dict[str, Any]:
    """The floor of a picture of `steps` steps as plain values: each stage's, the chain's, and that without prompt."""
    stages: dict[str, Any] = {}
    for graph, needs in work(bundle).items():
        by_matrix = needs.flops / ceilings.matrix > needs.bytes / ceilings.copy
        stages[graph] = {
            **asdict(needs),
            "launches": steps if graph in bundle.chain.loop else 1,
            "ms": 1e3 * ceilings.seconds(needs),
            "limit": "matrix rate" if by_matrix else "copy bandwidth",
        }
    ms = {graph: stage["launches"] * stage["ms"] for graph, stage in stages.items()}
    cached = sum(value for graph, value in ms.items() if graph not in bundle.chain.before)
    return {"stages": stages, "ms": sum(ms.values()), "cached_ms": cached}


def ceilings(device: str, precision: str | None = None) -> Ceilings:
    """Measure a GPU ("cuda", "cuda:1") or a CPU, in "fp32", "fp16" or "bf16" (None: fp16 on a GPU, fp32 on a CPU)."""
    import torch

    gpu = torch.device(device).type == "cuda"
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[precision or ("fp16" if gpu else "fp32")]
    shapes = [(n, n, n) for n in (512, 1024, 2048)]
    shapes = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 4096)] if gpu else shapes
    sizes = [2**30, 2**32] if gpu else [2**26, 2**28]
    if gpu:
        sizes = [size for size in sizes if 3 * size < torch.cuda.mem_get_info(device)[0]]

    def product(m: int, n: int, k: int) -> float:
        # Random values: zeros draw less power, and so run faster than any picture.
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        out = torch.empty((m, n), device=device, dtype=dtype)
        return 2 * m * n * k / _seconds(lambda: torch.mm(a, b, out=out), device, SECONDS if gpu else SECONDS_CPU)

    def convolution(channels: int, side: int) -> float:
        # PyTorch's product in fp32 is MKL's, which is slow on some CPUs; its convolutions are oneDNN's.
        x, weight = (torch.randn(s).to(dtype) for s in ((1, channels, side, side), (channels, channels, 3, 3)))
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        work = 2 * 9 * channels**2 * side**2
        return work / _seconds(lambda: torch.conv2d(x, weight, padding=1), device, SECONDS_CPU)

    def copy(size: int) -> float:
        source = torch.randint(0, 256, (size,), device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * size / _seconds(lambda: target.copy_(source), device, SECONDS if gpu else SECONDS_CPU)

    with torch.inference_mode():
        matrices = {"x".join(map(str, shape)): product(*shape) for shape in shapes}
        if not gpu:
            matrices |= {
                f"3x3 convolution, {c} channels, {s}x{s}": convolution(c, s) for c, s in ((512, 64), (256, 128))
            }
        copies = {str(size): copy(size) for size in sizes}
    if gpu:
        torch.cuda.empty_cache()
    return Ceilings(max(matrices.values()), max(copies.values()), str(dtype).removeprefix("torch."), matrices, copies)


def _seconds(run: Callable[[], Any], device: str, at_least: float) -> float:
    """The mean time of one `run` in a row of them that takes `at_least` seconds, after a first such row.

    On a CPU, which others may use too, the least mean of five rows.
    """
    import torch

    def row(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return time.perf_counter() - start

    gpu = torch.device(device).type == "cuda"

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize(device)

    row(1)
    repeats = math.ceil(at_least / row(1))
    row(repeats)
    return min(row(repeats) for _ in range(1 if gpu else 5)) / repeats


def table(counted: dict[str, Work]) -> str:
    """The counts as text."""
    rows = [[graph, f"{needs.flops / 1e9:.2f}", f"{needs.bytes / 1e6:.1f}"] for graph, needs in counted.items()]
    return console.table([["graph", "GFLOP", "MB"], *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser("floor", description="Count the work of a bundle's graphs.")
    parser.add_argument("bundle")
    sys.exit(console.run(parser, lambda arguments: print(table(work(Bundle.open(arguments.bundle)))), None))
