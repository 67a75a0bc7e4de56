"""Compute attention in fp32 inside a module of lower precision."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def upcast(model: nn.Module, names: Iterable[str]) -> None:
    """Compute Q·Kᵀ, the softmax and its product with V in fp32 in the named attentions (diffusers' or CLIP's).

    Their projections stay as they are: what they put out is cast up, and the result down again before the last one.
    """
    for name in names:
        attention: Any = model.get_submodule(name)
        clip = hasattr(attention, "q_proj")
        for projection in ("q_proj", "k_proj", "v_proj") if clip else ("to_q", "to_k", "to_v"):
            getattr(attention, projection).register_forward_hook(_up)
        (attention.out_proj if clip else attention.to_out[0]).register_forward_pre_hook(_down)
        if clip:
            attention.register_forward_pre_hook(_mask_up, with_kwargs=True)


def _up(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _down(projection: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(projection.weight.dtype),)


def _mask_up(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the mask's "minus infinity", fp16's lowest value: scores that overflow fp16 would outweigh it."""
    mask = named.get("attention_mask")
    if mask is not None:
        lowest = torch.finfo(torch.float32).min
        named = named | {"attention_mask": torch.where(mask < 0, lowest, 0.0)}
    return inputs, named
