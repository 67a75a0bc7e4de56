"""ControlNets and T2I-Adapters as they are traced, UNets that read what they make, and what is recorded of them."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn
from torch import nn

from turbochain.export.controls.controlnet import DOWN, MID
from turbochain.export.controls.t2i_adapter import FEATURE
from turbochain.export.tracing.modules import POOLED, Slice, UNet, pooled_part, timed_resnets
from turbochain.export.tracing.traced import Traced


class ControlNetEmbedding(Traced):
    """picture [B, H, W, 3] uint8 → what a ControlNet adds to its first convolution's result, [B, C, H/8, W/8] fp32."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.embedding, self.dtype = net.controlnet_cond_embedding, net.dtype
        self.reversed = net.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, control_image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        image = control_image.float().permute(0, 3, 1, 2) / 255
        image = image.flip(1) if self.reversed else image
        return self.embedding(image.to(self.dtype)).float()


class ControlNet(Traced):
    """latents, their scale, the columns of the time, the prompt, the picture's embedding, [1] → residuals, all fp32.

    The last input is what every residual is multiplied by. The columns are as those of the UNet.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def run(
        self,
        latents: torch.Tensor,
        input_scale: torch.Tensor,
        time: torch.Tensor,
        states: Sequence[torch.Tensor],
        embedding: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the residuals; `time` is what the ResNets read, `states` what stands side by side of the prompt."""
        net, dtype = self.net, self.net.dtype
        prompt = {"encoder_hidden_states": torch.cat([*states], dim=-1).to(dtype)} if states else {}
        sample = net.conv_in((input_scale * latents).to(dtype)) + embedding.to(dtype)
        made = [sample]
        for block in net.down_blocks:
            read = prompt if isinstance(block, CrossAttnDownBlock2D) else {}
            sample, of_block = block(hidden_states=sample, temb=time, **read)
            made += of_block
        if net.mid_block is not None:
            read = prompt if isinstance(net.mid_block, UNetMidBlock2DCrossAttn) else {}
            sample = net.mid_block(sample, time, **read)
        convolved = [conv(x) for conv, x in zip(net.controlnet_down_blocks, made, strict=True)]
        return tuple(x.float() * scale for x in (*convolved, net.controlnet_mid_block(sample)))


class SDControlNet(ControlNet):
    """`ControlNet` whose ResNets each read a slice of the `time_projections` [1, ΣC]."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        start = 0
        for resnet in timed_resnets(net):
            stop = start + resnet.time_emb_proj.out_features
            resnet.time_emb_proj, resnet.skip_time_act, start = Slice(start, stop), True, stop

    def forward(
        self, latents: torch.Tensor, input_scale: torch.Tensor, time_projections: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See the class; `more`: the prompt's states, if it reads them, the embedding and the scale."""
        *states, embedding, scale = more
        return self.run(latents, input_scale, time_projections.to(self.net.dtype), states, embedding, scale)


class SDXLControlNet(ControlNet):
    """`ControlNet` with `time_embeds` [1, D], `time_ids_embeds` [1, D], two text encoders' states and pooled embeds."""

    folded = POOLED

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.pooled = pooled_part(net)
        net.add_embedding.linear_1 = nn.Identity()

    def forward(
        self,
        latents: torch.Tensor,
        input_scale: torch.Tensor,
        time_embeds: torch.Tensor,
        time_ids_embeds: torch.Tensor,
        *more: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """See the class; `more`: the prompt's states, if it reads them, pooled embeds, the embedding and the scale."""
        *states, pooled, embedding, scale = more
        dtype = self.net.dtype
        added = self.net.add_embedding(self.pooled(pooled.to(dtype)) + time_ids_embeds.to(dtype))
        return self.run(latents, input_scale, time_embeds.to(dtype) + added, states, embedding, scale)


class T2IAdapter(Traced):
    """picture [B, H, W, 3 or 1] uint8 → features at the sizes of the UNet's levels, fp32."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, control_image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        image = control_image.float().permute(0, 3, 1, 2) / 255
        return tuple(feature.float() for feature in self.adapter(image.to(self.adapter.dtype)))


class T2IScale(Traced):
    """features, [1] → the features times that, fp32."""

    def __init__(self, nothing: nn.Module) -> None:
        super().__init__()

    def forward(self, *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        *made, scale = features
        return tuple(feature * scale for feature in made)


class Controlled(Traced):
    """A UNet as it is traced that also reads what ControlNets and T2I-Adapters make, after its other inputs."""

    def __init__(self, module: UNet, names: Sequence[str]) -> None:
        """Take the module, and the names of all inputs: its own, and those that are told by theirs."""
        super().__init__()
        self.module, self.names = module, tuple(names)
        self.folded = module.folded

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return what the module makes."""
        dtype, own = self.module.unet.dtype, []
        down, middle, features = [], None, []
        for name, value in zip(self.names, inputs, strict=True):
            if name.startswith(DOWN):
                down.append(value.to(dtype))
            elif name == MID:
                middle = value.to(dtype)
            elif name.startswith(FEATURE):
                features.append(value.to(dtype))
            else:
                own.append(value)
        given = {
            "down_block_additional_residuals": down or None,
            "mid_block_additional_residual": middle,
            "down_intrablock_additional_residuals": features or None,
        }
        with _given(self.module.unet, given):
            return self.module(*own)


@contextlib.contextmanager
def _given(unet: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Let calls of diffusers' UNet have these arguments too."""
    unet.forward = partial(unet.forward, **arguments)
    try:
        yield
    finally:
        del unet.forward


def projections(net: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Return what a ControlNet's ResNets add for each timestep, [T, 1, ΣC] fp32, in the order of `timed_resnets`."""
    embedding = net.time_embedding(net.time_proj(timesteps))
    made = [resnet.time_emb_proj(resnet.nonlinearity(embedding)) for resnet in timed_resnets(net)]
    return torch.cat(made, dim=-1).unsqueeze(1)


def embeds(net: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Return a ControlNet's time embedding, [T, 1, D] fp32, without that of the pooled embeds."""
    return net.time_embedding(net.time_proj(timesteps)).unsqueeze(1)


COLUMNS = {"time_projections": projections, "time_embeds": embeds}
"""Column of the UNet → function that returns that of a ControlNet in fp32, of the timesteps [T] fp32."""
