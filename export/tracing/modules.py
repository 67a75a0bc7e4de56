"""The modules that are traced: each one is all the arithmetic of its graph, so the runtime has none.

At every boundary tensors are fp32 (ids int32, pictures uint8); inside, a graph computes in its own precision. The text
encoders and the UNets are defined here, the others imported: here, and in `control`, `GraphSpec.module` is looked up.
"""

import copy
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from turbochain.export.tracing.sampler_steps import Blend, Enter, GuidedStep, Start, Step, StreamStep
from turbochain.export.tracing.traced import Traced
from turbochain.export.tracing.vae import SDXLVaeDecoder, SDXLVaeEncoder, VaeDecoder, VaeEncoder

__all__ = [
    "POOLED",
    "TORCH_DTYPES",
    "Blend",
    "Enter",
    "GuidedStep",
    "PenultimateTextEncoder",
    "PooledTextEncoder",
    "SDUNet",
    "SDXLUNet",
    "SDXLVaeDecoder",
    "SDXLVaeEncoder",
    "Slice",
    "Start",
    "Step",
    "StreamStep",
    "TextEncoder",
    "VaeDecoder",
    "VaeEncoder",
    "copy_modules",
    "pooled_part",
    "pooled_width",
    "timed_resnets",
]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TextEncoder(Traced):
    """ids [B, 77] int32 → last hidden state after the final norm [B, 77, D] fp32 (diffusers' SD pipeline).

    `clip_skip`: how many of the last layers are left out; the final norm is applied to what the one before them makes.
    """

    def __init__(self, text_encoder: nn.Module, clip_skip: int = 0) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.clip_skip = clip_skip

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if not self.clip_skip:
            return self.text_encoder(input_ids.long())[0].float()
        output = self.text_encoder(input_ids.long(), output_hidden_states=True)
        return self.text_encoder.final_layer_norm(output.hidden_states[-(self.clip_skip + 1)]).float()


class PenultimateTextEncoder(TextEncoder):
    """ids [B, 77] int32 → `hidden_states[-2]` [B, 77, D] fp32 (diffusers' SDXL pipeline, first encoder).

    With `clip_skip` the one so many layers earlier; no norm is applied.
    """

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        output = self.text_encoder(input_ids.long(), output_hidden_states=True)
        return output.hidden_states[-(self.clip_skip + 2)].float()


class PooledTextEncoder(TextEncoder):
    """As `PenultimateTextEncoder`, and the pooled projection [B, P] fp32 (SDXL's second encoder)."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        output = self.text_encoder(input_ids.long(), output_hidden_states=True)
        return output.hidden_states[-(self.clip_skip + 2)].float(), output.text_embeds.float()


class UNet(Traced):
    """latents [B, 4, H/8, W/8] fp32, scaled here, the columns of the time, and the prompt → prediction, same shape
    fp32.

    The first column is what `time_columns` makes of the timestep for this UNet, [1, …] fp32: all pictures add the same.
    In a stream it is [B, …] and the scale [B, 1, 1, 1]: each picture is at a row of its own.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.folded = frozenset(f"time_embedding.{name}" for name, _ in unet.time_embedding.named_parameters())
        unet.get_time_embed = lambda sample, timestep: timestep.to(sample.dtype)
        unet.time_embedding = _Given()

    def predict(
        self,
        latents: torch.Tensor,
        input_scale: torch.Tensor,
        time: torch.Tensor,
        states: torch.Tensor,
        added: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the prediction; `states` [B, 77, D] and `added` are diffusers' encoder_hidden_states,
        added_cond_kwargs."""
        dtype = self.unet.dtype
        sample = (input_scale * latents).to(dtype)
        prediction = self.unet(sample, time, states.to(dtype), added_cond_kwargs=added, return_dict=False)[0]
        return prediction.float()


class SDUNet(UNet):
    """`UNet` whose ResNets each read a slice of the `time_projections` [1, ΣC]."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        unet.time_embed_act = None
        self.projections: dict[str, int] = {}
        """Weight of a projection of the time → how many values of `time_projections` it makes; in their order."""
        names, start = {module: name for name, module in unet.named_modules()}, 0
        for resnet in timed_resnets(unet):
            name, stop = f"{names[resnet]}.time_emb_proj", start + resnet.time_emb_proj.out_features
            self.folded |= {f"{name}.{own}" for own, _ in resnet.time_emb_proj.named_parameters()}
            self.projections[f"{name}.weight"] = stop - start
            resnet.time_emb_proj, resnet.skip_time_act, start = Slice(start, stop), True, stop

    def forward(
        self,
        latents: torch.Tensor,
        input_scale: torch.Tensor,
        time_projections: torch.Tensor,
        prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """See the class."""
        return self.predict(latents, input_scale, time_projections, prompt_embeds)


class SDXLUNet(UNet):
    """`UNet` with `time_embeds` [1, D], two text encoders' states, and pooled embeds.

    `time_ids_embeds` [1, D] is the part of `add_embedding.linear_1` that reads the time ids, its bias included: so
    nothing of a size is in the weights.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        embedding = unet.add_embedding
        pooled = pooled_part(unet)
        embedding.linear_1 = nn.Identity()
        self.folded |= POOLED

        def embed(emb: torch.Tensor, encoder_hidden_states: Any, added_cond_kwargs: Any) -> torch.Tensor:
            read = pooled(added_cond_kwargs["text_embeds"].to(emb.dtype))
            return embedding(read + added_cond_kwargs["time_ids_embeds"].to(emb.dtype))

        self.pooled = pooled
        unet.get_aug_embed = embed

    def forward(
        self,
        latents: torch.Tensor,
        input_scale: torch.Tensor,
        time_embeds: torch.Tensor,
        time_ids_embeds: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_embeds_2: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """See the class; the states are joined on the last axis."""
        states = torch.cat([prompt_embeds, prompt_embeds_2], dim=-1)
        added = {"text_embeds": pooled_prompt_embeds, "time_ids_embeds": time_ids_embeds}
        return self.predict(latents, input_scale, time_embeds, states, added)


def copy_modules(model: nn.Module) -> nn.Module:
    """Return a copy of the tree of modules, which the modules here may change, on the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def timed_resnets(unet: nn.Module) -> list[Any]:
    """Return the UNet's ResNets that read the time, in the order of its modules."""
    return [m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]


def pooled_width(unet: Any) -> int:
    """Return how many columns of `add_embedding.linear_1` read the pooled embeds; the rest reads the six time ids."""
    return int(unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim)


POOLED = frozenset({"add_embedding.linear_1.weight", "add_embedding.linear_1.bias"})
"""The parameters that `pooled_part` is a part of."""


def pooled_part(unet: Any) -> nn.Linear:
    """Return the part of `add_embedding.linear_1` that reads the pooled embeds; its bias is with the time ids' part."""
    first = unet.add_embedding.linear_1
    pooled = nn.Linear(pooled_width(unet), first.out_features, bias=False, dtype=first.weight.dtype)
    pooled.weight = nn.Parameter(first.weight[:, : pooled.in_features].clone(), requires_grad=False)
    return pooled


class _Given(nn.Module):
    """A time embedding whose input is the embedding already."""

    def forward(self, embedding: torch.Tensor, condition: None) -> torch.Tensor:
        return embedding


class Slice(nn.Module):
    """A time projection that takes its part of all of them."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, projections: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return projections[:, self.start : self.stop]
