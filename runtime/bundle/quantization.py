"""What int8 needs to know of a graph: the ranges of what its products read and make, and what int8 costs each.

A product is a convolution or a linear layer. The file is in the bundle, and every backend makes its own form of int8
from it: FakeQuantize operators (OpenVINO) or QuantizeLinear and DequantizeLinear in ONNX (ONNX Runtime, TensorRT).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError

LEVELS = 255
"""Steps between the least and the greatest of the 256 values of a tensor that is not a weight."""

LARGEST = 127
"""The largest value of a weight; the least is its negative, so that zero is a level."""


@dataclass(frozen=True)
class Range:
    """The least and the greatest value of a tensor over all recorded runs."""

    low: float
    high: float

    @property
    def step(self) -> float:
        """Return the distance of two neighbouring levels, if the range is widened to hold zero."""
        return (max(self.high, 0.0) - min(self.low, 0.0)) / LEVELS or 1.0

    @property
    def zero(self) -> int:
        """Return the level, 0 to 255, that stands for zero."""
        return round(-min(self.low, 0.0) / self.step)


@dataclass(frozen=True)
class Rounding:
    """A tensor that may be rounded to the 256 levels of its range."""

    range: Range
    error: float  # relative L2 that it adds to the graph's result, see engines.calibration.share


@dataclass(frozen=True)
class Product:
    """A convolution or a linear layer. Its weight has a step for each output channel, max |w| / `LARGEST`."""

    reads: Rounding  # its first input
    makes: Rounding  # its result, with the bias of a convolution, for backends that round that too
    macs: int  # multiplications in a run of the graph


@dataclass(frozen=True)
class Quantization:
    """The file of a graph."""

    products: dict[str, Product]  # name of the ONNX node
    runs: int  # recorded runs of the graph that the ranges are of
    created_by: dict[str, str]  # package → version

    def kept(self, budget: float, *, results: bool = False) -> dict[str, Product]:
        """Return the products that are computed in int8: as many as add at most a relative L2 of `budget` together.

        Those with the smallest error for their multiplications come first. `results`: whether the results of
        convolutions are rounded too, whose errors count then.
        """
        costs = {n: p.reads.error**2 + (p.makes.error**2 if results else 0) for n, p in self.products.items()}
        left, found = budget**2, {}
        for name in sorted(costs, key=lambda name: costs[name] / self.products[name].macs):
            if costs[name] <= left:
                left -= costs[name]
                found[name] = self.products[name]
        return found


def file_name(graph: str) -> str:
    """Return the path of a graph's file in the bundle."""
    return f"graphs/{graph}.int8.json"


def read(bundle: Bundle, graph: str) -> Quantization:
    """Read and hash a graph's file; BundleError if there is none, or it is damaged."""
    file = bundle.manifest.graphs[graph].quantization
    if not file:
        raise BundleError(
            f"{bundle.path} does not say how {graph} is computed in int8: build an engine in int8 on this bundle, "
            f"which writes it: build-engine {bundle.path} -O int8=all"
        )
    bundle.check_files([file])
    try:
        return strict_json.convert(Quantization, json.loads((bundle.path / file).read_bytes()))
    except ValueError as error:
        raise BundleError(f"{file} is not valid: {error}; build the bundle again") from None


ROUND_RESULTS = ("onnxruntime",)
"""The backends that round the results of convolutions too: ONNX Runtime has them in int8 only from int8 to int8."""

PARTS: Mapping[str, tuple[str, ...]] = {"none": (), "vae": ("vae_decoder",), "all": ("unet", "vae_decoder")}
"""The option `int8` of a backend → the roles of the graphs that it computes in int8."""


def in_int8(graph: Graph, options: Mapping[str, Any]) -> bool:
    """Return whether an engine with these options computes the products of a graph in int8."""
    return graph.role in PARTS[options.get("int8", "none")]


def kept(bundle: Bundle, graph: str, backend: str, options: Mapping[str, Any]) -> dict[str, Product]:
    """Return the products of a graph that an engine of a backend with these options computes in int8.

    Raises BundleError as `read`.
    """
    if not in_int8(bundle.manifest.graphs[graph], options):
        return {}
    return read(bundle, graph).kept(options["int8_error"] / 100, results=backend in ROUND_RESULTS)
