"""PyTorch as the backend of our own GPU executor: the modules that are exported, run as the stages of a chain.

Not a backend of the product. The benchmark has it as a peer (our one CUDA graph with PyTorch's kernels in it), and
`first_gpu_run` as the way to put cuda.py and the executor on a GPU with nothing installed but PyTorch.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from turbochain.export import families, load, remedies
from turbochain.export.chains import Placed
from turbochain.export.families import Shape, common
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import attention, modules
from turbochain.export.tracing.modules import TORCH_DTYPES, copy_modules
from turbochain.export.tracing.rescale import rescale
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.gpu import GpuExecutor, GpuGraph
from turbochain.runtime.bundle.manifest import FORMAT_VERSION, REFERENCE, Engine, EngineGraph, EngineKey, Graph, Tensor
from turbochain.runtime.errors import CudaError, OutOfMemory, TurbochainError
from turbochain.runtime.selection import Found

Modules = Mapping[str, torch.nn.Module]
"""Graph → the module that computes it, on the device that it runs on."""


class Place(ABC):
    """Where modules run: PyTorch on the executor's memory and streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._views: dict[tuple[Tensor, int], torch.Tensor] = {}

    def view(self, tensor: Tensor, address: int) -> torch.Tensor:
        """Return the memory at an address as a tensor; it is not PyTorch's, and nothing is copied."""
        if (tensor, address) not in self._views:
            memory: Any = _Memory(tensor, address)
            source = memory if self.device.type == "cuda" else np.asarray(memory)
            self._views[tensor, address] = torch.as_tensor(source, device=self.device)
        return self._views[tensor, address]

    @abstractmethod
    def run(self, stream: Any, work: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        """Put on a stream what `work` computes; `uses`: address and bytes of all that it reads and writes."""


class OnGpu(Place):
    """A `Place` on an NVIDIA GPU.

    What a module allocates comes from a pool of its own: a captured graph writes there at each launch, so nobody else
    may have that memory as long as the graph lives.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__(torch.device("cuda", index))
        with torch.cuda.device(self.device):
            self.pool = torch.cuda.MemPool()

    def run(self, stream: Any, work: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        """See Place."""
        ours = torch.cuda.ExternalStream(int(stream), device=self.device)
        with torch.cuda.stream(ours), torch.cuda.use_mem_pool(self.pool, self.device):
            work()


class _Memory:
    """Memory at an address, by the protocol that numpy and, on a GPU, PyTorch take without a copy."""

    def __init__(self, tensor: Tensor, address: int) -> None:
        kind = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "uint8": "|u1"}[tensor.dtype]
        described = {"shape": tensor.shape, "typestr": kind, "data": (address, False), "strides": None, "version": 3}
        self.__array_interface__ = self.__cuda_array_interface__ = described


class TorchGraph(GpuGraph):
    """A module, its outputs copied to where the executor wants them."""

    def __init__(self, name: str, graph: Graph, module: torch.nn.Module, place: Place) -> None:
        self.name, self.graph, self.module, self.where = name, graph, module, place

    def enqueue(self, addresses: Mapping[str, int], stream: Any) -> None:
        """See GpuGraph."""
        uses = [(addresses[t.name], t.nbytes) for t in (*self.graph.inputs, *self.graph.outputs)]
        try:
            self.where.run(stream, partial(self._compute, dict(addresses)), uses)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemory(f"PyTorch in {self.name}: {_first_line(error)}") from error
        except RuntimeError as error:  # PyTorch has no class of its own for what CUDA refuses
            raise CudaError(f"PyTorch failed in {self.name}: {_first_line(error)}") from error

    @torch.no_grad()
    def _compute(self, addresses: dict[str, int]) -> None:
        made = self.module(*(self.where.view(t, addresses[t.name]) for t in self.graph.inputs))
        for tensor, value in zip(self.graph.outputs, made if isinstance(made, tuple) else (made,), strict=True):
            target = self.where.view(tensor, addresses[tensor.name])
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise TurbochainError(f"{self.name} makes {tensor.name} as {value.dtype} {list(value.shape)}")
            target.copy_(value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class TorchExecutor(GpuExecutor):
    """Every graph is a module."""

    def __init__(self, opened: Opened, made: Modules, place: Place) -> None:
        self.made, self.place = made, place
        super().__init__(opened)

    def load_graph(self, name: str) -> GpuGraph:
        """See GpuExecutor."""
        return TorchGraph(name, self.opened.bundle.manifest.graphs[name], self.made[name], self.place)


def executor(bundle: Bundle, made: Modules, place: Place, device: str = "cuda") -> TorchExecutor:
    """Return an executor on these modules, with nothing loaded."""
    index, gpu = cuda.find(device)
    return TorchExecutor(Opened(bundle, bundle.path, {}, Device("cuda", index, gpu)), made, place)


def pipeline(bundle: Bundle, made: Modules, place: Place, device: str = "cuda") -> Pipeline:
    """Return a pipeline of a bundle's chains on these modules; its files are hashed, and nothing is verified."""
    return Pipeline(bundle, found(bundle), executor(bundle, made, place, device))


def found(bundle: Bundle) -> Found:
    """Return what stands for an engine of PyTorch's; it counts as verified."""
    chains = [bundle.open_chain(name) for name in bundle.manifest.chains]
    stands_for = Engine(
        format_version=FORMAT_VERSION,
        key=EngineKey("torch", "cuda", "torch", str(torch.__version__), {}),
        graphs={name: EngineGraph(bundle.graph_digest(name), {}, 0, 0.0, 0) for name in bundle.manifest.graphs},
        checks={chain.name: () for chain in chains},
        verify_peak_bytes=0,
        created="",
        created_by={},
        verified={chain.name: chain.digest for chain in chains},
    )
    return Found(bundle.path, stands_for)


def placed(bundle: Bundle) -> dict[str, Placed]:
    """Return what each graph of a bundle is traced of, by its name."""
    family, chain = families.of(bundle.manifest.checkpoint.pipeline_class), bundle.open_chain()
    # What the VAE's encoder reads is of no interest here. Two graphs are steps, and the outputs tell them apart.
    specs = common.graphs(family, chain.chain.K, posterior=True).values()
    known = {(spec.role, spec.outputs): spec for spec in specs}
    return {
        name: Placed(
            known[graph.role, tuple(t.name for t in graph.outputs)],
            Shape(*(graph.size or chain.size), graph.batch, chain.chain.K),
        )
        for name, graph in bundle.manifest.graphs.items()
    }


def remedies_of(bundle: Bundle, precision: str | None = None) -> dict[str, Remedy]:
    """Return graph → what makes it right in its precision, or in another one, by the bundle's reference."""
    graphs, own = placed(bundle), bundle.manifest.graphs
    asked = {name: graph.spec.precision or precision or own[name].precision for name, graph in graphs.items()}
    return remedies.decide(graphs, asked, bundle.path / REFERENCE)


def of_parts(
    parts: Mapping[str, torch.nn.Module], bundle: Bundle, changes: Mapping[str, Remedy], device: torch.device
) -> dict[str, torch.nn.Module]:
    """Return graph → the module that is exported for it, on the device, the UNet and the VAE channels last.

    `parts`: component → diffusers' or transformers' model in fp32. Their weights take the remedies' precision and
    scale, and are the modules' own.
    """
    made, graphs = {}, placed(bundle)
    models = _models(parts, graphs, changes)
    for name, graph in graphs.items():
        spec, remedy, model = graph.spec, changes[name], models[name]
        if remedy.exponents:
            rescale(model, remedy.exponents)
        model.to(device=device, dtype=TORCH_DTYPES[remedy.precision])
        if spec.component in ("unet", "vae"):
            model.to(memory_format=torch.channels_last)
        model = copy_modules(model)  # which the module changes
        attention.upcast(model, remedy.attention)
        module = getattr(modules, spec.module)(model, *spec.arguments(graph.shape))
        made[name] = module.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the executor's streams do not wait for the one that this is done on
    return made


def _models(
    parts: Mapping[str, torch.nn.Module], graphs: Mapping[str, Placed], changes: Mapping[str, Remedy]
) -> dict[str, torch.nn.Module]:
    """Return graph → the model of its component: a copy if another graph of it changes the weights in its own way."""
    first: dict[str, Remedy] = {}
    found = {}
    for name, graph in graphs.items():
        remedy, model = changes[name], parts.get(graph.spec.component, torch.nn.Module())
        other = first.setdefault(graph.spec.component, remedy)
        alike = remedy is other or (remedy.precision, {}, {}) == (other.precision, remedy.exponents, other.exponents)
        found[name] = model if alike else copy.deepcopy(model)
    return found


def of_checkpoint(checkpoint: Checkpoint, bundle: Bundle, device: torch.device) -> dict[str, torch.nn.Module]:
    """Return the same of a checkpoint's weights, each graph in the precision that the bundle has it in."""
    parts = {c: load.component(checkpoint, c, torch.float32) for c in checkpoint.family.components}
    return of_parts(parts, bundle, remedies_of(bundle), device)


def compiled(made: Modules, bundle: Bundle, device: torch.device) -> dict[str, torch.nn.Module]:
    """Return the modules compiled by Inductor, without CUDA graphs of its own, which ours could not hold.

    Each runs once, so that what the compiler allocates to try its kernels is not of the executor's pool.
    """
    found = {}
    for name, module in made.items():
        if not bundle.manifest.graphs[name].component:
            found[name] = module
            continue
        found[name] = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)
        ends = bundle.manifest.graphs[name].inputs
        with torch.no_grad():
            found[name](*(torch.zeros(t.shape, dtype=getattr(torch, t.dtype), device=device) for t in ends))
    return found
