"""The roofline floor of a bundle: a time that no implementation on a machine can be much faster than.

    python benchmarks/floor.py sd-turbo.bundle

counts each graph's work (no GPU is needed); `ceilings` measures the machine's best rates. A stage's floor is the larger
of operations ÷ matrix rate and bytes ÷ copy bandwidth, the chain's is the sum over its launches.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import product
from product import Launches
from rows import Ceilings, Floor, StageFloor
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError

UNKNOWN = ("Attention", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "LSTM", "MatMulInteger", "RNN")
"""Operators whose work is not counted: a graph that has one is refused, because its floor would be too low."""

SECONDS = 0.5  # for which each product and copy is repeated: the clocks settle
SECONDS_CPU = 0.1
GPU_PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 4096))  # m, n, k
CPU_PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048))
CPU_CONVOLUTIONS = ((512, 64), (256, 128))  # channels, height and width
GPU_COPIES, CPU_COPIES = (2**30, 2**32), (2**26, 2**28)  # bytes


@dataclass(frozen=True)
class Work:
    """The least that one launch of a graph computes and moves."""

    flops: int
    bytes: int


def count(path: Path) -> Work:
    """Count the work of an ONNX graph, without reading its weights; InputError if it has an operator of UNKNOWN."""
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


def seconds(work: Work, ceilings: Ceilings) -> float:
    """Return the floor of one launch."""
    return max(work.flops / ceilings.matrix, work.bytes / ceilings.copy)


def of(graphs: Sequence[Launches], ceilings: Ceilings, *, precision: str, batch: int, steps: int) -> Floor:
    """Return the floor of a call: each graph's, the sum over the launches, and that sum without the text encoders."""
    floors = {}
    for one in graphs:
        work = count(one.file)
        by_matrix = work.flops / ceilings.matrix > work.bytes / ceilings.copy
        floors[one.name] = StageFloor(
            flops=work.flops,
            bytes=work.bytes,
            launches=one.launches,
            ms=1e3 * seconds(work, ceilings),
            limit="matrix rate" if by_matrix else "copy bandwidth",
        )
    ms = {one.name: one.launches * floors[one.name].ms for one in graphs}
    cached = sum(ms[one.name] for one in graphs if not one.of_prompt)
    return Floor(
        precision=precision, batch=batch, steps=steps, ceilings=ceilings, stages=floors, ms=sum(ms.values()),
        cached_ms=cached,
    )  # fmt: skip


def ceilings(device: str, precision: str | None = None) -> Ceilings:
    """Measure a device's best rates in "fp32", "fp16" or "bf16" (None: fp16 on a GPU, fp32 on a CPU)."""
    import torch

    gpu = torch.device(device).type == "cuda"
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[precision or ("fp16" if gpu else "fp32")]
    sizes: Sequence[int] = CPU_COPIES
    if gpu:
        sizes = [size for size in GPU_COPIES if 3 * size < torch.cuda.mem_get_info(device)[0]]

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
        matrices = {"x".join(map(str, shape)): product(*shape) for shape in (GPU_PRODUCTS if gpu else CPU_PRODUCTS)}
        if not gpu:
            matrices |= {f"3x3 convolution, {c} channels, {s}x{s}": convolution(c, s) for c, s in CPU_CONVOLUTIONS}
        copies = {str(size): copy(size) for size in sizes}
    if gpu:
        torch.cuda.empty_cache()
    return Ceilings(max(matrices.values()), max(copies.values()), str(dtype).removeprefix("torch."), matrices, copies)


def _seconds(run: Callable[[], Any], device: str, at_least: float) -> float:
    """Return the mean time of one `run` in a series that takes `at_least` seconds, after a first such series.

    On a CPU, which other programs may use too, it is the least mean of five series.
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


def table(bundle: Path) -> str:
    """Return a bundle's counts as text."""
    counted = {one.name: count(one.file) for one in product.stages(bundle, 1)}
    rows = [[name, f"{work.flops / 1e9:.2f}", f"{work.bytes / 1e6:.1f}"] for name, work in counted.items()]
    return console.table([["graph", "GFLOP", "MB"], *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser("floor", description="Count the work of a bundle's graphs.")
    parser.add_argument("bundle", type=Path)
    sys.exit(console.run(parser, lambda arguments: print(table(arguments.bundle)), None))
