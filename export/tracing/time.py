"""Compute what a UNet makes of the timestep alone: columns of a table, so that no picture pays for it.

An LCM's UNet (one with `time_cond_proj_dim`) adds an embedding of the guidance scale to that of the timestep.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from turbochain.export.tracing.modules import pooled_width, timed_resnets

Columns = dict[str, torch.Tensor]


def _embedding(unet: Any, timesteps: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
    """Return the UNet's time embedding [T, D]."""
    condition = None if guidance is None else _guidance_embedding(guidance, unet.config.time_cond_proj_dim)
    return unet.time_embedding(unet.time_proj(timesteps), condition)


def _guidance_embedding(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """Return [T, width] fp32, as the pipelines embed guidance_scale − 1, which they subtract in fp64."""
    from diffusers import StableDiffusionPipeline

    embed: Any = StableDiffusionPipeline.get_guidance_scale_embedding  # it does not use the pipeline
    return embed(None, (guidance - 1).float(), width)


def _projections(unet: Any, timesteps: torch.Tensor, guidance: torch.Tensor | None) -> Columns:
    """Return `time_projections` [T, 1, ΣC] fp32: what each ResNet adds of the time, in the order of `timed_resnets`.

    And `activated_time_embedding` [T, 1, D], which those projections read: an adapter that changes a projection needs it.
    """
    act = unet.time_embed_act or nn.Identity()
    embedding = act(_embedding(unet, timesteps, guidance))
    resnets = timed_resnets(unet)
    activated = [embedding if r.skip_time_act else r.nonlinearity(embedding) for r in resnets]
    made = [r.time_emb_proj(a) for r, a in zip(resnets, activated, strict=True)]
    return {
        "time_projections": torch.cat(made, dim=-1).unsqueeze(1),
        "activated_time_embedding": activated[0].unsqueeze(1),
    }


def _embeds(unet: Any, timesteps: torch.Tensor, guidance: torch.Tensor | None) -> Columns:
    """Return `time_embeds` [T, 1, D] fp32: the UNet's time embedding, without that of the pooled embeds."""
    return {"time_embeds": _embedding(unet, timesteps, guidance).unsqueeze(1)}


COLUMNS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor | None], Columns]] = {
    "time_projections": _projections,
    "time_embeds": _embeds,
}
"""Column → function that returns it and what belongs to it, of diffusers' UNet in fp32, the timesteps [T] fp32, and
the guidance scales [T] fp64 of an LCM's UNet, or None."""


def _time_ids_embeds(unet: Any, time_ids: tuple[int, ...]) -> torch.Tensor:
    """Return the part of `add_embedding.linear_1` for these time ids [1, D] fp32, bias included; summed in fp64.

    `time_ids` [6]: original height, width, crop top, left, target height, width, in pixels.
    """
    first, split = unet.add_embedding.linear_1, pooled_width(unet)
    read = unet.add_time_proj(torch.tensor(time_ids)).flatten().double()
    constant = first.bias.double() + first.weight[:, split:].double() @ read
    return constant.float().unsqueeze(0)


CONSTANTS: dict[str, Callable[..., torch.Tensor]] = {"time_ids_embeds": _time_ids_embeds}
"""Column that is the same in every row → function of diffusers' UNet, in fp32, and the family's arguments."""


def watch(stack: ExitStack, unet: Any, column: str, see: Callable[[torch.Tensor], None]) -> None:
    """Call `see` with a column's row [1, …] whenever diffusers' own UNet has computed it, until `stack` is closed."""
    if column == "activated_time_embedding":  # which all projections read
        first = timed_resnets(unet)[0].time_emb_proj
        stack.callback(first.register_forward_pre_hook(lambda _, given: see(given[0][:1])).remove)
        return
    projections = [_without_adapters(r.time_emb_proj) for r in timed_resnets(unet)]
    parts = projections if column == "time_projections" else [unet.time_embedding]
    made: dict[int, torch.Tensor] = {}  # by the part's place, for they do not run in the order of the modules

    def after(place: int, _: Any, __: Any, output: torch.Tensor) -> None:
        made[place] = output[:1]
        if len(made) == len(parts):
            see(torch.cat([made[i] for i in range(len(parts))], dim=-1))
            made.clear()

    for place, part in enumerate(parts):
        stack.callback(part.register_forward_hook(partial(after, place)).remove)


def _without_adapters(layer: nn.Module) -> nn.Module:
    """Return a layer itself, if peft wraps it: the table has what it makes without adapters."""
    return dict(layer.named_children()).get("base_layer", layer)
