"""A VAE that overflows fp16, before and after it is rescaled: torch on the CPU rounds every fp16 result."""

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from turbochain.export import remedies
from turbochain.export.tracing.rescale import rescale
from turbochain.runtime.checks import metrics

PARTS = ("decoder", "encoder")
SCALINGS = ("0", "1", "2", "3", "conv1 only", "conv_in only")
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "two layers": {"layers_per_block": 2},
    "no attention": {"mid_block_add_attention": False},
    "attention in every block": {
        "down_block_types": ["AttnDownEncoderBlock2D"] * 3,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 3,
    },
    "no quant_conv": {"use_quant_conv": False, "use_post_quant_conv": False},
    "one width": {"block_out_channels": [16, 16, 16]},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vae(checkpoints: dict[str, Path]) -> Any:
    return AutoencoderKL.from_pretrained(checkpoints["sdxl"] / "vae").eval().requires_grad_(False)


def run(vae: Any, part: str) -> torch.Tensor:
    """The picture, or the moments, for a fixed input in the VAE's precision."""
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        if part == "decoder":
            latents = torch.randn(1, 4, 6, 6, generator=generator) / vae.config.scaling_factor
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        picture = torch.rand(1, 3, 48, 48, generator=generator) * 2 - 1
        posterior = vae.encode(picture.to(vae.dtype), return_dict=False)[0]
        return posterior.parameters


def reached(vae: Any, part: str) -> dict[str, float]:
    """Module → the largest absolute value that it puts out."""
    found: dict[str, float] = {}
    handles = []
    for name, module in vae.named_modules():

        def see(_: Any, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = float(output.abs().max())

        handles.append(module.register_forward_hook(see))
    run(vae, part)
    for handle in handles:
        handle.remove()
    return found


def grown(vae: Any, part: str, scaling: str) -> Any:
    """A copy with a stream and conv1 outputs beyond fp16's range, which computes the same but for the epsilons.

    Factors that are no powers of two, another one after every up- or downsampler.
    """
    draw = random.Random(scaling)
    vae = copy.deepcopy(vae)
    stream = 1.0 if scaling == "conv1 only" else draw.uniform(2e4, 2e5)
    for name in reached(vae, part):  # in the order of the forward pass
        module = vae.get_submodule(name)
        if not name.startswith(part) or not hasattr(module, "weight"):
            continue
        weight, bias = 1.0, 1.0
        if scaling == "conv_in only":
            weight = bias = 1e6 if name.endswith("conv_in") else 1.0
        elif name.endswith("conv1"):
            weight = bias = draw.uniform(1e4, 1e5)
        elif name.endswith(("conv_in", "conv2", "to_out.0")):
            weight = bias = stream
        elif name.endswith("conv_shortcut"):
            bias = stream
        elif "samplers" in name:
            weight = 1.0 if scaling == "conv1 only" else draw.uniform(0.1, 10)
            stream *= weight
            bias = stream
        module.weight.mul_(weight)
        module.bias.mul_(bias)
    return vae


def levels(image: torch.Tensor) -> Any:
    return torch.round((image.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).numpy()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("part", PARTS)
def test_what_overflows_fp16_is_right_when_rescaled(vae: Any, part: str, scaling: str) -> None:
    large = grown(vae, part, scaling)
    right = run(large, part)
    assert not torch.isfinite(run(copy.deepcopy(large).half(), part)).all()

    double = copy.deepcopy(large).double()
    exact = run(double, part)
    remedy = remedies.remedy(f"vae_{part}", reached(large, part))
    assert remedy.precision == "fp16" and remedy.exponents and not remedy.attention
    rescale(double, remedy.exponents)
    assert torch.equal(run(double, part), exact)

    rescale(large, remedy.exponents)
    result = run(large.half(), part)
    # The same VAE before it was grown shows what fp16 costs; its own epsilons make no difference of this size.
    usual = metrics.relative_l2(run(copy.deepcopy(vae).half(), part).float().numpy(), run(vae, part).numpy())
    assert metrics.relative_l2(result.float().numpy(), right.numpy()) < 1.5 * usual < 5e-3
    if part == "decoder":
        assert metrics.psnr(levels(result), levels(right)) > 55


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", PARTS)
def test_any_exponents_leave_the_result_as_it_is(part: str, variant: str) -> None:
    """Bit for bit in fp64; and each module's output is as small as was asked for."""
    config: dict[str, Any] = {
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    torch.manual_seed(1)
    vae = AutoencoderKL(**config | VARIANTS[variant]).eval().requires_grad_(False).double()
    exact, before = run(vae, part), reached(vae, part)
    draw = random.Random(variant)
    containers = r".*(mid_block|blocks\.\d+|samplers\.0)"  # they put out what the last module in them does
    modules = [m for m in before if remedies._STREAM.fullmatch(m) and not re.fullmatch(containers, m)]
    exponents = {m: draw.randint(1, 9) for m in modules if draw.random() < 0.5}
    factors = rescale(vae, exponents)
    assert torch.equal(run(vae, part), exact)
    after = reached(vae, part)
    assert exponents and all(after[m] <= before[m] * 2.0 ** -exponents[m] for m in exponents)
    assert factors and all(name.startswith(f"{part}.") for name in factors)


def test_only_what_overflows_is_touched(vae: Any) -> None:
    """One conv1: it, and the epsilon of the norm that reads it."""
    name = "decoder.up_blocks.1.resnets.0"
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    norms = {n: m.eps for n, m in vae.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    factors = rescale(vae, {f"{name}.conv1": 3})
    assert factors == {f"{name}.conv1.weight": 1 / 8, f"{name}.conv1.bias": 1 / 8}
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key] * factors.get(key, 1.0))
    for n, m in vae.named_modules():
        if isinstance(m, torch.nn.GroupNorm):
            assert m.eps == (norms[n] / 64 if n == f"{name}.norm2" else norms[n])


def test_the_scale_changes_where_the_stream_passes_a_convolution(vae: Any) -> None:
    """What overflows after the last upsampler leaves the stream before it, and its weights' precision, alone."""
    exponents = {"decoder.up_blocks.3.resnets.1": 5}
    factors = rescale(vae, exponents)
    touched = {name.removeprefix("decoder.") for name in factors}
    assert touched == {
        f"up_blocks.3.resnets.{i}.{conv}.{p}"
        for i, conv in ((0, "conv2"), (0, "conv_shortcut"), (1, "conv2"))
        for p in ("weight", "bias")
    }
