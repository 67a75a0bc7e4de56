"""Schedulers that have no table: what is said of each, and what stays as it was."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_ancestral
from samplers import BETAS, sampler, write

from turbochain.export import load, schedule
from turbochain.export.run import SamplerRun
from turbochain.runtime import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, about numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("limit", [0.5, 10.0, 1000.0])
def test_a_sampler_that_clips_is_refused(limit: float) -> None:
    clipping = sampler("DDIMScheduler", clip_sample=True, clip_sample_range=limit)
    with pytest.raises(InputError, match=r"DDIMScheduler has clip_sample=True in its config.*set clip_sample to false"):
        schedule.tabulate(clipping, SamplerRun(4))


def test_thresholding_is_named_if_it_is_the_reason() -> None:
    with pytest.raises(InputError, match=r"DPMSolverMultistepScheduler has thresholding=True in its config"):
        schedule.tabulate(sampler("DPMSolverMultistepScheduler", thresholding=True), SamplerRun(2))
    with pytest.raises(InputError, match=r"has clip_sample=True and thresholding=True .*set clip_sample and thres"):
        schedule.tabulate(sampler("DDPMScheduler", thresholding=True, clip_sample=True), SamplerRun(2))
    with pytest.raises(InputError, match="has no rows after 2 of 2 steps"):  # not the reason
        schedule.tabulate(sampler("DDIMScheduler", clip_sample=True), SamplerRun(2, begin=2))


class NoiseOfItsOwn(diffusers.EulerDiscreteScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)
        return (result[0] + torch.randn(result[0].shape, generator=torch.Generator().manual_seed(3)),)


class Squaring(diffusers.EulerDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output * model_output, timestep, sample, **kwargs)


class BentAtFirst(diffusers.EulerDiscreteScheduler):
    """By a thousandth, in the first step alone."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        bend = 0 if self.step_index else 1e-3
        return super().step(model_output + bend * model_output.abs(), timestep, sample, **kwargs)


class Rounding(diffusers.EulerDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step((model_output * 10).round() / 10, timestep, sample, **kwargs)


class KeepingNear(diffusers.EulerDiscreteScheduler):
    """It draws a sample that is far from its own last result towards that, which inpainting would notice."""

    last: Any = None

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        if self.last is not None:
            sample = self.last + (sample - self.last).clamp(-300, 300)
        (self.last, *_) = result = super().step(model_output, timestep, sample, **kwargs)
        return result


class DrawingTwice(diffusers.EulerAncestralDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, **kwargs: Any) -> Any:
        euler_ancestral.randn_tensor(sample.shape, generator=generator)
        return super().step(model_output, timestep, sample, generator, **kwargs)


class Shifting(diffusers.EulerDiscreteScheduler):
    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        return super().scale_model_input(sample, timestep).roll(1, -1)


class NotANumberWhenLarge(diffusers.EulerDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(model_output.where(model_output.abs() < 100, torch.nan), timestep, sample, **kwargs)


class MixingPictures(diffusers.EulerDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        mixed = model_output.mean(0, keepdim=True).expand_as(model_output)
        return super().step(mixed, timestep, sample, **kwargs)


class Masked(diffusers.EulerDiscreteScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, mask: Any, **kwargs: Any) -> Any:  # type: ignore
        return super().step(model_output * mask, timestep, sample, **kwargs)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (NoiseOfItsOwn, "adds noise that is not the generator's"),
        (Squaring, "computes something that is not linear"),
        (BentAtFirst, "computes something that is not linear"),
        (Rounding, "computes something that is not linear"),
        (KeepingNear, "computes something that is not linear"),
        (DrawingTwice, "draws noise 2 times in one step"),
        (Shifting, "does not scale the latents by one number"),
        (NotANumberWhenLarge, "computes something that is not linear"),
        (MixingPictures, "computes something that is not linear"),
        (Masked, "needs mask in every step, which the diffusers pipelines do not give"),
        (diffusers.FlowMatchEulerDiscreteScheduler, "has no .*add_noise.*, which the diffusers pipelines use"),
        (diffusers.RePaintScheduler, "needs original_image, mask in every step"),
    ],
)
def test_why_a_scheduler_is_refused(cls: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"the scheduler {cls.__name__} {reason}.*name another class .Euler"):
        schedule.tabulate(cls(), SamplerRun(2))


def test_steps_that_the_scheduler_itself_refuses() -> None:
    with pytest.raises(InputError, match=r"LCMScheduler cannot be used .* set_timesteps\(51\): .*original_steps"):
        schedule.tabulate(sampler("LCMScheduler"), SamplerRun(51))


def test_a_package_that_a_scheduler_needs_and_that_is_missing(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "DPMSolverSDEScheduler", "StableDiffusionPipeline", **BETAS)
    with pytest.raises(InputError, match=r"DPMSolverSDEScheduler (cannot be loaded .*torchsde|adds noise).*another"):
        schedule.tabulate(load.scheduler(checkpoint), SamplerRun(2))


def test_the_module_draws_as_before_after_a_refusal() -> None:
    before = euler_ancestral.randn_tensor
    schedule.tabulate(sampler("EulerAncestralDiscreteScheduler"), SamplerRun(2))
    with pytest.raises(InputError):
        schedule.tabulate(sampler("EulerAncestralDiscreteScheduler", prediction_type="sample"), SamplerRun(2))
    assert euler_ancestral.randn_tensor is before
