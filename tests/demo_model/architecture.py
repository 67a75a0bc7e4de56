"""The demo model's parts: SD-Turbo's classes and scheduler at narrow widths, with a reduced CLIP vocabulary."""

import itertools
import re
from pathlib import Path
from typing import Any

import scenes
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from turbochain.export.sources.vocabulary import BEGIN, END, MAX_TOKENS, clip_vocabulary, save_tokenizer

TIMESTEPS = (999, 749, 666, 499, 332, 249)
"""The trailing timesteps of 1, 2, 3 and 4 steps."""


def words() -> list[str]:
    """Every word of the grammar."""
    texts = (*scenes.COLOURS, *scenes.SHAPES, *scenes.DIAMETERS, *scenes.RELATIONS, "a an on background")
    return sorted({word for text in texts for word in text.split()})


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer with only those merges that the grammar's words need; other words become letters.

    Each word of the grammar is one token, as in CLIP; the ids are different. Padded with "!" as SD-Turbo's.
    """
    vocabulary, merges = clip_vocabulary()
    needed = {merge for word in words() for merge in _merged(word, merges)}
    kept = [merge for merge in merges if merge in needed]
    tokens = [*list(vocabulary)[:512], *("".join(merge) for merge in kept), BEGIN, END]
    ids = {token: i for i, token in enumerate(tokens)}
    save_tokenizer(folder, ids, kept, pad_token="!")


def _merged(word: str, merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding carries out on `word`."""
    rank = {merge: i for i, merge in enumerate(merges)}
    parts, done = [*word[:-1], word[-1] + "</w>"], []
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in rank]:
        best = min(pairs, key=lambda pair: rank[pair])
        at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
        parts[at : at + 2] = ["".join(best)]
        done.append(best)
    return done


def vae() -> AutoencoderKL:
    """The autoencoder, untrained: 8× reduction, 4 latent channels."""
    return AutoencoderKL(
        sample_size=scenes.PIXELS,
        block_out_channels=[8, 16, 32, 32],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=1,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder, untrained."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            projection_dim=96,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def unet() -> UNet2DConditionModel:
    """The UNet, untrained. As in SDXL its first level, 64×64, attends to nothing: that is where the time would go.

    The noise's means place the objects (`scenes.place`): the strided convolutions start as low-pass filters, and what
    is added to the residual stream as nothing, so that the means reach the coarsest level from the first step.
    """
    model = UNet2DConditionModel(
        sample_size=scenes.PIXELS // 8,
        block_out_channels=[32, 48, 80, 96],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[2, 3, 5, 6],  # diffusers' name for the number of heads
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=96,
        use_linear_projection=True,
    )
    binomial = torch.tensor([1.0, 2.0, 1.0])
    with torch.no_grad():
        for block in model.down_blocks[:-1]:
            weight = block.downsamplers[0].conv.weight
            weight *= 0.5
            weight += torch.eye(len(weight))[:, :, None, None] * binomial[:, None] * binomial / 8
        for name, parameter in model.named_parameters():
            if re.search(r"conv2|proj_out", name):
                parameter.zero_()
    return model


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for a trained UNet: a copy of its encoder half, and convolutions that read a picture.

    Of the latter only the last is left to train. Those before it are set so that each of the 64 pixels of a latent
    has a channel of its own: the same in every training step, and no edge is lost. They have an eighth of the usual
    widths, for at 512×512 the picture would otherwise cost more than all the rest.
    """
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(1, 4, 16, 64))
    reads = model.controlnet_cond_embedding
    reads.requires_grad_(False)
    with torch.no_grad():
        for convolution in (reads.conv_in, *reads.blocks):
            convolution.weight.zero_()
            convolution.bias.zero_()
        reads.conv_in.weight[..., 1, 1] = 0.5
        for convolution in reads.blocks:
            channels = convolution.out_channels
            if convolution.stride == (1, 1):  # each channel stays
                convolution.weight[..., 1, 1] = 1.25 * torch.eye(channels)
            else:  # each becomes four: the pixels of a 2×2 square
                convolution.weight[..., 1:, 1:] = 1.25 * torch.eye(channels).view(channels, -1, 2, 2)
        reads.conv_out.weight.normal_(std=0.1)  # zeros, as diffusers has them, would learn nothing behind other zeros
    reads.conv_out.requires_grad_(True)
    return model


def scheduler() -> EulerDiscreteScheduler:
    """SD-Turbo's scheduler, but for the prediction: at σ = 14.6 an ε-prediction multiplies its error by σ."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


def timesteps(steps: int) -> list[int]:
    """Those of a run of `steps` steps."""
    made = scheduler()
    made.set_timesteps(steps)
    return [int(t) for t in made.timesteps]


def sigmas() -> dict[int, float]:
    """Timestep → σ, at TIMESTEPS."""
    kept: Any = scheduler().alphas_cumprod
    return {t: float(((1 - kept[t]) / kept[t]) ** 0.5) for t in TIMESTEPS}
