"""PyTorch's modules as stages on the stand-in, and on a CPU, where they make the right pictures."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from standin import Module, Runtime
from standin.runtime import Refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_map_only

import torch_stages
from torch_stages import Modules, Place, TorchGraph
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.backends.cpu import CpuExecutor, CpuGraph


class OnStandIn(Place):
    """A `Place` on the stand-in: PyTorch on a CPU, at the addresses of its memory, as one kernel.

    As on a GPU, a module's Python runs when it is put on a stream, and its operations later, at each launch of a graph.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(torch.device("cpu"))
        self.module = Module(runtime, 0)
        weakref.finalize(self, self.module.unload).atexit = False

    def run(self, stream: Any, work: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        with Noted() as noted:
            work()
        self.launch(stream, noted.do, uses)

    def launch(self, stream: Any, kernel: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        try:
            self.module.launch(stream, kernel, uses)
        except Refused as refused:
            raise RuntimeError(refused.status.name) from None  # as PyTorch does


class Noted(TorchDispatchMode):
    """Notes the operations on tensors and does none of them; what they make has memory of its own from the start."""

    def __enter__(self) -> Any:
        self.steps: list[Callable[[], None]] = []
        return super().__enter__()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = partial(operation, *args, **(kwargs or {}))
        if operation.is_view:
            return whole()
        if operation._schema.is_mutable:
            self.steps.append(whole)  # type: ignore[arg-type]
            return args[0]
        shapes = _shapes(operation, args, kwargs or {})
        made = tree_map_only(torch.Tensor, partial(torch.empty_like, device="cpu"), shapes)
        self.steps.append(partial(_into, made, whole))
        return made

    def do(self) -> None:
        """Do everything, with the values that are there now."""
        with torch.no_grad():
            for step in self.steps:
                step()


_SHAPES: dict[tuple[Any, ...], Any] = {}
"""Operation and its arguments, tensors by their shape → what it makes, on the meta device."""


def _shapes(operation: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operation makes, on the meta device, where one that needs a value fails. Each is asked once."""
    leaves, form = tree_flatten((args, kwargs))
    key = (operation, str(form), *map(_described, leaves))
    if key not in _SHAPES:
        given = tree_map(_without_values, (args, kwargs))
        _SHAPES[key] = operation(*given[0], **given[1])
    return _SHAPES[key]


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), value


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _into(made: Any, operation: Callable[[], Any]) -> None:
    for target, value in zip(tree_iter(made), tree_iter(operation()), strict=True):
        if isinstance(target, torch.Tensor):
            target.copy_(value)


class AtLaunch(OnStandIn):
    """The same, quicker: the module's Python runs at each launch."""

    def run(self, stream: Any, work: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        self.launch(stream, work, uses)


class Direct(Place):
    """No stream."""

    def run(self, stream: Any, work: Callable[[], None], uses: Sequence[tuple[int, int]]) -> None:
        work()


class OnCpu(CpuExecutor):
    """The executor of the CPU backends on these modules."""

    def __init__(self, bundle: Bundle, made: Modules) -> None:
        super().__init__(Opened(bundle, bundle.path, {}, Device("cpu")))
        self.made = made

    def load_graph(self, name: str) -> CpuGraph:
        """See CpuExecutor."""
        described = self.opened.bundle.manifest.graphs[name]
        return CpuModule(TorchGraph(name, described, self.made[name], Direct(torch.device("cpu"))))


class CpuModule(CpuGraph):
    """A module on numpy's arrays."""

    def __init__(self, graph: TorchGraph) -> None:
        self.graph = graph

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """See CpuGraph."""
        return partial(self.graph.enqueue, {name: array.ctypes.data for name, array in arrays.items()}, None)

    def operators(self) -> Iterable[tuple[str, float]]:
        """See CpuGraph."""
        return ()


def on_cpu(bundle: Bundle, made: Modules) -> Pipeline:
    """Return a pipeline of a bundle's chains on these modules, on a CPU."""
    return Pipeline(bundle, torch_stages.found(bundle), OnCpu(bundle, made))
