"""Run a diffusers pipeline as if it computed in a lower precision, on a CPU that does not.

PyTorch has no fast fp16 on most CPUs: one evaluation of a UNet takes minutes. Here every operation computes in fp32,
and what it makes is rounded, as hardware does that accumulates in fp32. A small model takes two to four times as long
as in fp32, a large one little longer.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from turbochain.export.recording import put
from turbochain.export.tracing.modules import TORCH_DTYPES


class _Rounding(TorchDispatchMode):
    """Round what every operation makes to the values that `dtype` has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return made  # a view: its values are rounded already
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                value.copy_(value.to(self.dtype))
        return made


@contextlib.contextmanager
def computing_in(models: Mapping[str, Any], precision: str) -> Iterator[None]:
    """Let pipelines of fp32 compute as their models (by component) would in `precision`; weights are rounded for good.

    As in diffusers, the sinusoid of the timestep and the sampler are computed in fp32, and in fp16 a VAE whose config
    has force_upcast.
    """
    dtype = TORCH_DTYPES[precision]
    upcast = precision == "fp16" and models["vae"].config.get("force_upcast")
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            for parameter in model.parameters():
                parameter.data.copy_(parameter.data.to(dtype))
            if not (upcast and name == "vae"):
                _round(stack, model, dtype)
        yield


def _round(stack: contextlib.ExitStack, model: Any, dtype: torch.dtype) -> None:
    """Round in a model's calls until the stack is closed, but not in its sinusoids' calls."""
    entered = [name for name in ("forward", "encode", "decode") if name in dir(model)]
    for name in entered:
        put(stack, model, name, _within(getattr(model, name), dtype))
    for name, module in model.named_modules():
        if name in ("time_proj", "add_time_proj"):
            put(stack, module, "forward", _without(module.forward))


def _within(call: Any, dtype: torch.dtype) -> Any:
    def rounded(*args: Any, **options: Any) -> Any:
        args, options = tree_map(lambda value: _as(value, dtype), (args, options))
        with _Rounding(dtype):
            return call(*args, **options)

    return rounded


def _without(call: Any) -> Any:
    def exact(*args: Any, **options: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return call(*args, **options)

    return exact


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Return an argument, rounded; timesteps, which have one dimension or none, stay as the pipeline gives them."""
    known = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim > 1
    return value.to(dtype).float() if known else value
