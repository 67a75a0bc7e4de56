"""Record what ControlNets and T2I-Adapters make in a call of a diffusers pipeline, by the names that a chain has."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from turbochain.export.controls import controlnet, t2i_adapter
from turbochain.export.controls.controlnet import EMBEDDING, own
from turbochain.export.controls.kind import Configs, Control
from turbochain.export.families import Family
from turbochain.export.tracing import time
from turbochain.runtime.checks.reference import SAMPLED, sample
from turbochain.runtime.inputs.embeds import NEGATIVE

Row = dict[str, torch.Tensor]
Hook = Callable[[contextlib.ExitStack, torch.nn.Module, Callable[[dict[str, Any], Any], object]], None]
"""Calls a function after every forward of a module, with its arguments by name and its result."""


def feed(family: Family, configs: Configs, control: Control) -> str:
    """Return the name that a chain has for the control image."""
    feeds = control.kind.feeds(family, configs, control)
    return next(name for name, one in feeds.items() if one.is_ == "image")


def watch(
    stack: contextlib.ExitStack,
    hook: Hook,
    pipeline: Any,
    family: Family,
    control: Control,
    guided: bool,
    once: Row,
    most: int | None = None,
) -> list[Row]:
    """Add to `once` what is made once, and return a list that gets what is read and made in each step.

    `most`: the steps of which the list gets a ControlNet's residuals (None: all).
    """
    net = getattr(pipeline, control.kind.argument)
    rows: list[Row] = []
    if control.kind is controlnet.KIND:
        columns: Row = {}
        for name in family.columns:
            time.watch(stack, net, name, partial(columns.__setitem__, own(name, control)))
        hook(stack, net.controlnet_cond_embedding, lambda _, made: once.update({EMBEDDING: _half(made, guided)}))

        def keep(call: dict[str, Any], made: Any) -> None:
            residuals = _residuals(made, guided) if most is None or len(rows) < most else {}
            rows.append({**columns, controlnet.SCALE: torch.tensor([float(call["conditioning_scale"])]), **residuals})

        hook(stack, net, keep)
        return rows

    def read(_: Any, __: Any, call: dict[str, Any]) -> None:
        given = call["down_intrablock_additional_residuals"]
        states = [value for name, value in once.items() if name.startswith(t2i_adapter.STATE)]
        values = [torch.zeros_like(s) for s in states] if given is None else [_half(v, guided).clone() for v in given]
        row = {f"{t2i_adapter.FEATURE}{i}": value for i, value in enumerate(values)}
        rows.append({**row, t2i_adapter.SCALE: torch.tensor([0.0 if given is None else 1.0])})

    names = t2i_adapter.STATE
    hook(stack, net, lambda _, made: once.update({f"{names}{i}": v.clone() for i, v in enumerate(made)}))
    stack.callback(pipeline.unet.register_forward_pre_hook(read, with_kwargs=True).remove)
    return rows


def sampled(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a call, with a sample in place of each one that was made from the control image."""
    kept: dict[str, np.ndarray] = {}
    for name, value in found.items():
        own = name.removeprefix(NEGATIVE)
        if own.startswith((controlnet.DOWN, controlnet.MID)):
            kept[SAMPLED + name] = np.stack([sample(row) for row in value])
        elif own.startswith((controlnet.EMBEDDING, t2i_adapter.STATE)):
            kept[SAMPLED + name] = sample(value)
        elif not own.startswith(t2i_adapter.FEATURE):  # which is a product of these
            kept[name] = value
    return kept


def _residuals(made: Any, guided: bool) -> Row:
    """Return what a ControlNet made; with guidance the negative half stands first."""
    down, middle = made
    values = {**{f"{controlnet.DOWN}{i}": value for i, value in enumerate(down)}, controlnet.MID: middle}
    found: Row = {}
    for name, value in values.items():
        if guided:
            found[NEGATIVE + name] = value.chunk(2)[0]
        found[name] = _half(value, guided)
    return found


def _half(value: torch.Tensor, guided: bool) -> torch.Tensor:
    return value.chunk(2)[1] if guided else value
