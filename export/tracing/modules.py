"""The modules that are traced: each one is all the arithmetic of its stage, so the runtime has none.

At every boundary tensors are fp32 (ids int32, the picture uint8): a stage's precision is its own affair.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class TextEncoder(nn.Module):
    """ids [B, 77] int32 → last hidden state after the final norm [B, 77, D] fp32 (diffusers' SD pipeline)."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.text_encoder(input_ids.long())[0].float()


class PenultimateTextEncoder(TextEncoder):
    """ids [B, 77] int32 → `hidden_states[-2]` [B, 77, D] fp32 (diffusers' SDXL pipeline, first encoder)."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.text_encoder(input_ids.long(), output_hidden_states=True).hidden_states[-2].float()


class PooledTextEncoder(TextEncoder):
    """As `PenultimateTextEncoder`, and the pooled projection [B, P] fp32 (SDXL's second encoder)."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        output = self.text_encoder(input_ids.long(), output_hidden_states=True)
        return output.hidden_states[-2].float(), output.text_embeds.float()


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of a timestep [1, n] fp32 → the UNet's own embedding of it [1, D] fp32.

    It runs at load, so it has fp32 copies of the weights, whatever the UNet's precision; the UNet stays whole.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.time_embedding = copy.deepcopy(unet.time_embedding).float()

    def forward(self, timestep_embedding: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.time_embedding(timestep_embedding)


class TimeProjections(TimeEmbedding):
    """As `TimeEmbedding`, and on to what each ResNet makes of it: [1, ΣC] fp32, in the order of `timed_resnets`."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.act = unet.time_embed_act or nn.Identity()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Identity() if r.skip_time_act else r.nonlinearity, copy.deepcopy(r.time_emb_proj).float())
            for r in timed_resnets(unet)
        )

    def forward(self, timestep_embedding: torch.Tensor) -> torch.Tensor:
        """See the class."""
        embedding = self.act(self.time_embedding(timestep_embedding))
        return torch.cat([project(embedding) for project in self.projections], dim=-1)


def timed_resnets(unet: nn.Module) -> list[Any]:
    """The UNet's ResNets that read the time, in the order of its modules."""
    return [m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]


class UNetStep(nn.Module):
    """One sampler step: `a·latents + b·unet(input_scale·latents) + c·noise`, [B, 4, H/8, W/8] fp32.

    The time enters as what `TimeEmbedding` makes of the timestep, [1, D] fp32.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        unet.get_time_embed = lambda sample, timestep: timestep.to(sample.dtype)  # [1, D]: all pictures add the same
        unet.time_embedding = _Given()

    def condition(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """What the network reads besides latents and time: encoder_hidden_states, added_cond_kwargs."""
        return prompt_embeds, None

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        input_scale: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        *conditioning: torch.Tensor,
    ) -> torch.Tensor:
        """See the class; `conditioning` is what `condition` takes."""
        hidden_states, added = self.condition(*conditioning)
        dtype = self.unet.dtype
        prediction = self.unet(
            (input_scale * latents).to(dtype),
            time,
            hidden_states.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return a * latents + b * prediction.float() + c * noise


class SDUNetStep(UNetStep):
    """`UNetStep` where the time is what `TimeProjections` makes of it, and each ResNet reads its slice."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        unet.time_embed_act = None
        start = 0
        for resnet in timed_resnets(unet):
            stop = start + resnet.time_emb_proj.out_features
            resnet.time_emb_proj, resnet.skip_time_act, start = _Slice(start, stop), True, stop


class SDXLUNetStep(UNetStep):
    """`UNetStep` with two text encoders' states and pooled embeds; the time ids are constant, and folded away."""

    folded = ("add_embedding.linear_1.weight", "add_embedding.linear_1.bias")
    """Parameters of the UNet that this module holds only as what it computed of them."""

    def __init__(self, unet: Any, time_ids: Sequence[int]) -> None:
        """`time_ids` [6]: original height, width, crop top, left, target height, width, in pixels."""
        super().__init__(unet)
        embedding = unet.add_embedding
        embedding.linear_1 = _absorb(embedding.linear_1, unet.add_time_proj(torch.tensor(time_ids)).flatten())
        unet.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: embedding(
            added_cond_kwargs["text_embeds"].to(emb.dtype)
        )

    def condition(  # type: ignore[override]
        self, prompt_embeds: torch.Tensor, prompt_embeds_2: torch.Tensor, pooled_prompt_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The states joined on the last axis, and the pooled embeds."""
        return torch.cat([prompt_embeds, prompt_embeds_2], dim=-1), {"text_embeds": pooled_prompt_embeds}


class _Given(nn.Module):
    """In the place of a time embedding: what came in is it."""

    def forward(self, embedding: torch.Tensor, condition: None) -> torch.Tensor:
        return embedding


class _Slice(nn.Module):
    """In the place of a time projection: its part of all of them."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, projections: torch.Tensor) -> torch.Tensor:
        return projections[:, self.start : self.stop]


def _absorb(linear: nn.Linear, tail: torch.Tensor) -> nn.Linear:
    """A Linear of `x` that equals `linear` of `cat([x, tail])`: the constant part joins the bias, summed in fp64."""
    split = linear.in_features - len(tail)
    result = nn.Linear(split, linear.out_features, dtype=linear.weight.dtype)
    constant = linear.bias.double() + linear.weight[:, split:].double() @ tail.double()
    result.weight = nn.Parameter(linear.weight[:, :split].clone(), requires_grad=False)
    result.bias = nn.Parameter(constant.to(linear.bias.dtype), requires_grad=False)
    return result


class VaeDecoder(nn.Module):
    """latents [B, 4, H/8, W/8] fp32 → picture [B, H, W, 3] uint8, as diffusers' image processor rounds it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        config = vae.config
        mean = getattr(config, "latents_mean", None) or [0.0] * config.latent_channels
        std = getattr(config, "latents_std", None) or [1.0] * config.latent_channels
        scale = torch.tensor(std, dtype=torch.float64) / config.scaling_factor
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(mean).float().reshape(1, -1, 1, 1))

    def forward(self, next_latents: torch.Tensor) -> torch.Tensor:
        """See the class."""
        latents = next_latents * self.scale + self.shift
        image = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        levels = torch.round((image * 0.5 + 0.5).clamp(0, 1) * 255)
        # uint8 must be the very last node: TensorRT refuses it in the middle of a graph.
        return levels.permute(0, 2, 3, 1).contiguous().to(torch.uint8)
