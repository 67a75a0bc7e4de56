"""Make an AutoencoderKL whose fp32 values exceed fp16's range fit it exactly.

A GroupNorm gives the same for x and x/s when its epsilon is divided by s², and in a VAE everything that reads the
residual stream reads it through one. So the stream can run at 1/s: what is added to it (conv_in, conv2, to_out) is
divided by s. The scale changes where the stream itself passes a convolution (conv_shortcut, the up- and downsamplers),
whose weight then carries s_in/s_out and whose bias 1/s_out; between two such places it is one. What conv1 of a block
puts out is read by norm2 alone, and has a scale of its own. Every s is a power of two, so in exact arithmetic and in
any floating-point format whose range suffices the result is the same, bit for bit.
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def rescale(vae: nn.Module, exponents: Mapping[str, int]) -> dict[str, float]:
    """Change the weights of `vae` (fp32 or fp64, in place): each named module puts out 2⁻ᵉ or less of what it did.

    `exponents`: module → e. The modules are those of the stream (conv_in, resnets, attentions, samplers and the
    convolutions in them) and conv1; a block's own name says no more than that of its last module. A scale is no
    larger than its stretch of the stream asks for: small weights become subnormal in fp16. Returns parameter → the
    factor that it was multiplied by, if that is not 1.
    """
    factors: dict[str, float] = {}
    for name, part in vae.named_children():
        if name in ("decoder", "encoder"):
            _rescale_part(name, part, exponents, factors)
    parameters = dict(vae.named_parameters())
    with torch.no_grad():
        for name, factor in factors.items():
            parameters[name].mul_(factor)
    return factors


def _rescale_part(part_name: str, part: nn.Module, exponents: Mapping[str, int], factors: dict[str, float]) -> None:
    def divide(name: str, module: nn.Module, exponent: int, already: int = 0) -> None:
        """Make a convolution or matrix put out 2^-exponent of what it did, its input being at 2^-already."""
        for parameter, power in (("weight", already - exponent), ("bias", -exponent)):
            if power and getattr(module, parameter) is not None:
                factors[f"{name}.{parameter}"] = 2.0**power

    before = 0
    for stretch in _stretches(part_name, part):
        after = max(_wanted(name, exponents) for name, _ in stretch)
        for i, (name, module) in enumerate(stretch):
            here = before if i == 0 else after  # only the first can change the scale
            if isinstance(module, ResnetBlock2D):
                own = exponents.get(f"{name}.conv1", 0)
                divide(f"{name}.conv1", module.conv1, own)
                divide(f"{name}.conv2", module.conv2, after)
                if module.conv_shortcut is not None:
                    divide(f"{name}.conv_shortcut", module.conv_shortcut, after, here)
                _shrink_epsilon(module.norm1, here)
                _shrink_epsilon(module.norm2, own)
            elif isinstance(module, Attention):
                divide(f"{name}.to_out.0", module.to_out[0], after)
                _shrink_epsilon(module.group_norm, here)
            else:
                divide(name, module, after, here)
        before = after
    _shrink_epsilon(part.conv_norm_out, before)


def _shrink_epsilon(norm: nn.GroupNorm, exponent: int) -> None:
    norm.eps *= 4.0**-exponent


def _wanted(name: str, exponents: Mapping[str, int]) -> int:
    """Return the exponent that a module needs, with its parts that add to the stream."""
    mine = (e for m, e in exponents.items() if m == name or (m.startswith(f"{name}.") and not m.endswith(".conv1")))
    return max(mine, default=0)


def _stretches(part_name: str, part: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield the modules that the stream runs through, in order, split before each that can change its scale."""
    stretch: list[tuple[str, nn.Module]] = []
    for name, module in _stream(part):
        changes = not isinstance(module, Attention) and getattr(module, "conv_shortcut", module) is not None
        if changes and stretch:
            yield stretch
            stretch = []
        stretch.append((f"{part_name}.{name}", module))
    yield stretch


def _stream(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield conv_in, every resnet, attention and sampler's convolution with its name, in the order of the forward
    pass."""
    yield "conv_in", part.conv_in
    if hasattr(part, "up_blocks"):
        blocks = ["mid_block", *(f"up_blocks.{i}" for i in range(len(part.up_blocks)))]
    else:
        blocks = [*(f"down_blocks.{i}" for i in range(len(part.down_blocks))), "mid_block"]
    for name in blocks:
        block = part.get_submodule(name)
        resnets = [(f"{name}.resnets.{i}", m) for i, m in enumerate(block.resnets)]
        attentions = [(f"{name}.attentions.{i}", m) for i, m in enumerate(getattr(block, "attentions", []))]
        for pair in zip_longest(resnets, attentions):
            yield from (item for item in pair if item is not None and item[1] is not None)
        for kind in ("upsamplers", "downsamplers"):
            for i, sampler in enumerate(getattr(block, kind, None) or ()):
                if isinstance(getattr(sampler, "conv", None), nn.Conv2d):
                    yield f"{name}.{kind}.{i}.conv", sampler.conv
