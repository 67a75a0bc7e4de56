"""What int8 needs to know of a graph: the ranges of what its layers read and make, and what rounding them costs.

A layer is a convolution or a linear layer. The file is in the bundle, and every backend makes its own form of int8 from
it: FakeQuantize operators (OpenVINO), or QuantizeLinear and DequantizeLinear in ONNX (ONNX Runtime).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Graph
from turbochain.runtime.errors import BundleError

if TYPE_CHECKING:
    from turbochain.runtime.bundle.opened import Bundle

LEVELS = 255
"""Steps between the least and the greatest of the 256 values of a tensor that is not a weight."""

LARGEST = 127
"""The largest value of a weight of 8 bits; the least is its negative, so that zero is a level."""

PARTS: Mapping[str, tuple[str, ...]] = {"none": (), "vae": ("vae_decoder",), "all": ("unet", "vae_decoder")}
"""The option `int8` of a backend → the roles of the graphs that it computes in int8."""

ROUND_RESULTS = ("onnxruntime",)
"""The backends that round the results of convolutions too: ONNX Runtime has them in int8 only from int8 to int8."""


@dataclass(frozen=True)
class Range:
    """The least and the greatest value that a tensor may have."""

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
    error: float  # relative L2 that it adds to the picture or to the latents, see engines.calibration


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer. Its weight has a step for each output channel, max |w| / `LARGEST`."""

    reads: Rounding  # its first input
    weight_error: float  # what rounding the weight adds, likewise
    makes: Rounding | None  # a convolution's result, bias included, for backends that round that too
    macs: int  # multiplications in a run of the graph

    def squared_error(self, results: bool, bits: int) -> float:
        """Return the square of what int8 adds; `results`: whether convolutions' results are rounded too.

        `bits`: of the weight. With one bit less its steps are twice as large.
        """
        weight = self.weight_error * 2 ** (8 - bits)
        return self.reads.error**2 + weight**2 + (self.makes.error**2 if results and self.makes else 0.0)


@dataclass(frozen=True)
class Quantization:
    """The file of a graph."""

    layers: dict[str, Layer]  # name of the ONNX node → layer
    runs: int  # recorded runs of the graph that the ranges were measured in
    created_by: dict[str, str]  # package → version

    def kept(self, error: float, *, results: bool = False, bits: int = 8) -> dict[str, Layer]:
        """Return the layers to compute in int8: as many as add at most a relative L2 of `error` together.

        Errors add up as squares. The layers with the smallest squared error for their multiplications come first.
        `results`, `bits`: see `Layer.squared_error`.
        """
        costs = {name: layer.squared_error(results, bits) for name, layer in self.layers.items()}
        left, found = error**2, {}
        for name in sorted(costs, key=lambda name: costs[name] / self.layers[name].macs):
            if costs[name] <= left:
                left -= costs[name]
                found[name] = self.layers[name]
        return found


def file_name(graph_name: str) -> str:
    """Return the path of a graph's file in the bundle."""
    return f"graphs/{graph_name}.int8.json"


def read(bundle: "Bundle", name: str) -> Quantization:
    """Read the file of the graph of this name, which is hashed first; BundleError if there is none, or it is
    damaged."""
    file = bundle.manifest.graphs[name].quantization
    if not file:
        raise BundleError(
            f"{bundle.path} does not say how {name} is computed in int8: build an engine in int8 on this bundle, which "
            f"writes it: build-engine {bundle.path} -O int8=all"
        )
    bundle.check_files([file])
    return strict_json.read(Quantization, bundle.path / file)


def in_int8(graph: Graph, options: Mapping[str, Any]) -> bool:
    """Return whether an engine with these options computes layers of a graph in int8."""
    return graph.role in PARTS[options.get("int8", "none")]


def of(graphs: Mapping[str, Graph], options: Mapping[str, Any]) -> list[str]:
    """Return the names of the graphs of which an engine with these options computes layers in int8."""
    return [name for name, graph in graphs.items() if in_int8(graph, options)]


def count(
    bundle: "Bundle", backend: str, options: Mapping[str, Any], names: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Return graph → how many layers an engine computes in int8, and how many there are, of those named that are in
    int8; see `kept`."""
    graphs = {name: bundle.manifest.graphs[name] for name in names}
    return {
        name: (len(kept(bundle, name, backend, options)), len(read(bundle, name).layers))
        for name in of(graphs, options)
    }


def told(counted: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return what `count` returns as texts for people."""
    return [f"{name} in int8: {kept} of {of} layers" for name, (kept, of) in counted.items()]


def kept(bundle: "Bundle", name: str, backend: str, options: Mapping[str, Any]) -> dict[str, Layer]:
    """Return the layers of a graph that an engine of a backend with these options computes in int8, by name.

    The option `int8_error` (percent) says how much they may add. Raises BundleError as `read`.
    """
    if not in_int8(bundle.manifest.graphs[name], options):
        return {}
    how = {"results": backend in ROUND_RESULTS, "bits": options.get("weight_bits", 8)}
    return read(bundle, name).kept(options["int8_error"] / 100, **how)
