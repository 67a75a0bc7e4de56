"""Tables against the schedulers themselves: every class that diffusers exports has a true table, or is refused."""

import copy
import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as image_to_image
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_ancestral

from turbochain.export import load, schedule, tables, tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Shape
from turbochain.export.recording import Call, record_call
from turbochain.export.requested import Requested
from turbochain.export.run import Run
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import InputError
from turbochain.runtime.chain.tables import ARRAYS, Table

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, about numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (2, 4, 3, 5)
BOUND = 1e-4  # relative L2; schedulers cancel in fp32: up to 2.6e-5 was measured, a clipped one is off by 0.26 or more
OF_EULER = {key: value for key, value in BETAS.items() if key != "clip_sample"}
CLASSES = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
)
LINEAR = (  # what TASKS calls the 17
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
)
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"skip_prk_steps": True},
    {"use_karras_sigmas": True},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"prediction_type": "sample", "timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"solver_order": 1},
    {"solver_order": 3, "final_sigmas_type": "sigma_min"},
    {"predict_x0": False},
    {"clip_denoised": False},
    {"predictor_order": 3, "corrector_order": 3},
)


def write(folder: Path, name: str, pipeline: str, **options: Any) -> Checkpoint:
    """As much of a checkpoint as says which scheduler it has."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name, **options}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "scheduler": ["diffusers", name]}))
    return Checkpoint(folder, None)


def sampler(name: str, **options: Any) -> Any:
    return getattr(diffusers, name).from_config({**BETAS, **options})


@dataclasses.dataclass
class Step:
    """One call of a scheduler's `step`."""

    t: float
    sample: torch.Tensor
    scaled: torch.Tensor
    prediction: torch.Tensor
    made: torch.Tensor
    later: tuple[float, float] | None  # (p, q) with which inpainting adds noise for the next step


Network = Callable[[torch.Tensor, float], torch.Tensor]


def network(scaled: torch.Tensor, t: float) -> torch.Tensor:
    """A stand-in for the UNet: bounded, not linear, and mixing values."""
    return torch.tanh(scaled.roll(1, -1) - 0.5 * scaled.roll(1, -2)) + 0.1 * np.sin(t / 100)


def prepared(scheduler: Any, run: Run) -> tuple[Any, torch.Tensor]:
    """A copy of the scheduler that diffusers' own pipeline has made ready for the run, and the run's timesteps."""
    scheduler = copy.deepcopy(scheduler)
    explicit = None if run.timesteps is None else list(run.timesteps)
    kwargs = {"original_inference_steps": run.original_steps, "strength": run.strength}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    timesteps, steps = image_to_image.retrieve_timesteps(scheduler, run.steps, "cpu", explicit, **kwargs)
    if run.begin is not None:
        pipeline: Any = SimpleNamespace(scheduler=scheduler)
        strength = (steps - run.begin + 0.5) / steps
        timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    return scheduler, timesteps


def follow(scheduler: Any, run: Run, replaced: bool) -> tuple[tuple[float, float] | None, list[Step]]:
    """A run as the pipelines do it, and the (p, q) that image-to-image begins it with.

    `replaced`: with another sample before every step, as inpainting has.
    """
    scheduler, timesteps = prepared(scheduler, run)
    accepted = inspect.signature(scheduler.step).parameters
    generator, random = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
    extra = {k: v for k, v in (("eta", run.eta), ("generator", generator)) if k in accepted}
    units = torch.eye(2).reshape(2, 1, 1, 1, 2)

    def pair(timesteps: torch.Tensor) -> tuple[float, float]:
        p, q = scheduler.add_noise(*units, timesteps).flatten().tolist()
        return p, q

    start = None if run.begin is None and run.strength is None else pair(timesteps[:1])
    x, taken = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma, []
    for i, t in enumerate(timesteps):
        x = torch.randn(SHAPE, generator=random) if replaced else x
        scaled = scheduler.scale_model_input(x, t)
        prediction = network(scaled, float(t))
        made = scheduler.step(prediction, t, x, **extra, return_dict=False)
        made = made[1] if run.strength and i + 1 == len(timesteps) else made[0]  # the LCM pipelines decode `denoised`
        later = pair(torch.tensor([timesteps[i + 1]])) if replaced and i + 1 < len(timesteps) else None
        taken.append(Step(float(t), x, scaled, prediction, made, later))
        x = made
    return start, taken


def largest_error(table: Table, theirs: list[Step], replaced: bool) -> float:
    """Follow the table alone, from the same seed; the largest distance to the scheduler's run in any step."""
    generator = torch.Generator().manual_seed(7)
    state = torch.zeros(table.K, *SHAPE, dtype=torch.float64)
    state[0] = torch.from_numpy(table.init_noise_sigma) * torch.randn(SHAPE, generator=generator)
    worst = 0.0
    for i, step in enumerate(theirs):
        m, v, w = (torch.from_numpy(a[i].astype(np.float64)) for a in (table.m, table.v, table.w))
        if replaced:
            state[0] = step.sample
        prediction = network((float(table.input_scale[i]) * state[0]).float(), table.timesteps[table.index[i]])
        noise = torch.randn(SHAPE, generator=generator) if table.draws_noise[i] else torch.zeros(SHAPE)
        state = torch.stack(
            [sum(m[j, k] * state[k] for k in range(table.K)) + v[j] * prediction + w[j] * noise for j in range(table.K)]
        )
        size = max(float(step.made.norm()), float(step.sample.norm()))
        worst = max(worst, float((step.made - state[0]).norm()) / size)
    return worst


def check_table(scheduler: Any, run: Run) -> Table:
    """The table, after two runs of the scheduler; an InputError of `tabulate` passes through."""
    table = schedule.tabulate(scheduler, run)
    inpainting = run if run.strength else dataclasses.replace(run, begin=run.begin or 0)
    for replaced, same in {False: run, True: inpainting}.items():
        start, theirs = follow(scheduler, same, replaced)
        assert start is None or tuple(table.start[0].tolist()) == start
        assert table.rows == len(theirs)
        assert table.timesteps[table.index].tolist() == [float(np.float32(step.t)) for step in theirs]
        for i, step in enumerate(theirs):
            assert torch.allclose(step.scaled, float(table.input_scale[i]) * step.sample, rtol=1e-5, atol=0)
            assert step.later is None or tuple(table.start[i + 1].tolist()) == step.later
        assert largest_error(table, theirs, replaced) <= BOUND
    return table


def check_refusal(scheduler: Any, steps: int, message: str) -> None:
    """A refusal must be true: the scheduler itself clips, fails or gives NaN, or lacks what pipelines use."""
    assert message.startswith(f"the scheduler {type(scheduler).__name__} ")
    assert type(scheduler).__name__ not in message.split("was expected")[1]
    if "clipping is not linear" in message:
        assert any(scheduler.config.get(key) for key in ("clip_sample", "thresholding", "clip_denoised"))
    elif "NaN or infinity" in message:
        assert not all(torch.isfinite(step.made).all() for step in follow(scheduler, Run(steps), False)[1])
    elif "which the diffusers pipelines use" in message:
        missing = message.split(" has no ")[1].split(", which")[0].split(", ")
        assert not any(hasattr(scheduler, attribute) for attribute in missing)
    elif "in every step" in message:
        with pytest.raises(TypeError, match="missing"):
            follow(scheduler, Run(steps), False)[1]
    else:
        assert "cannot be used as the diffusers pipelines do" in message
        with pytest.raises(Exception):  # noqa: B017 (whatever it raises)
            follow(scheduler, Run(steps), False)[1]


def variations(name: str) -> Iterator[Any]:
    """The class with each set of options that it has and takes."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    for options in VARIATIONS:
        if options.keys() <= parameters.keys():
            try:
                yield sampler(name, **options)
            except (NotImplementedError, ValueError):  # a combination that this class refuses itself
                continue


@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_of_diffusers_has_a_true_table_or_is_refused(name: str, tmp_path: Path) -> None:
    try:
        load.scheduler(write(tmp_path, name, "StableDiffusionXLPipeline", **BETAS))
    except InputError as error:
        assert name not in LINEAR and name in str(error)
        return
    taken = 0
    for scheduler in variations(name):
        for steps in (1, 2, 4, 8):
            try:
                check_table(scheduler, Run(steps))
                if steps == 4:
                    check_table(scheduler, Run(steps, begin=1))
                taken += 1
            except InputError as error:
                check_refusal(scheduler, steps, str(error))
    assert taken >= 4 or name not in LINEAR


def test_the_seventeen_classes_are_exported_by_diffusers() -> None:
    assert len(LINEAR) == 17 and set(LINEAR) <= set(CLASSES)


TENSORS = (  # K, evaluations for 8 steps, class, options: found by hand or by another prototype, see the papers
    *((1, 8, name, {}) for name in ("EulerAncestralDiscreteScheduler", "EDMEulerScheduler", "DDIMScheduler")),
    *((1, 8, name, {}) for name in ("DDPMScheduler", "LCMScheduler", "TCDScheduler")),
    *((1, 8, "EulerDiscreteScheduler", {"prediction_type": p}) for p in ("epsilon", "v_prediction", "sample")),
    (1, 8, "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    (1, 8, "DPMSolverMultistepScheduler", {"solver_order": 1}),
    (2, 8, "DPMSolverMultistepScheduler", {}),
    (2, 8, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    (2, 8, "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    (2, 8, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    (2, 8, "DPMSolverSinglestepScheduler", {"solver_order": 2}),
    (2, 8, "DEISMultistepScheduler", {"solver_order": 2}),
    *((2, 15, name, {}) for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")),
    (2, 15, "KDPM2AncestralDiscreteScheduler", {}),
    (3, 8, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    (3, 8, "UniPCMultistepScheduler", {"solver_order": 2}),
    (3, 8, "SASolverScheduler", {}),
    (4, 8, "UniPCMultistepScheduler", {"solver_order": 3}),
    (4, 8, "LMSDiscreteScheduler", {}),
    (4, 9, "PNDMScheduler", {"skip_prk_steps": True}),
)


@pytest.mark.parametrize(("K", "evaluations", "name", "options"), TENSORS)
def test_how_many_tensors_go_round_the_loop(K: int, evaluations: int, name: str, options: dict[str, Any]) -> None:
    table = schedule.tabulate(sampler(name, **options), Run(8))
    assert (table.K, table.rows) == (K, evaluations)
    assert {name: getattr(table, name).dtype.name for name in (*ARRAYS, "timesteps")} == {
        **dict.fromkeys(("m", "v", "w", "input_scale", "start", "init_noise_sigma", "timesteps"), "float32"),
        "draws_noise": "bool",
        "index": "int32",
    }
    assert table.m.shape == (evaluations, K, K) and table.v.shape == table.w.shape == (evaluations, K)
    assert table.start.shape == (evaluations, 2) and table.init_noise_sigma.shape == ()


def test_timesteps_that_come_twice_are_stored_once() -> None:
    table = schedule.tabulate(sampler("HeunDiscreteScheduler"), Run(3))
    assert table.index.tolist() == [0, 1, 1, 2, 2] and len(table.timesteps) == 3


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_where_image_to_image_starts(name: str) -> None:
    """Against the formula p·z + q·ε of the training process: σ or √ᾱ and √(1 − ᾱ) at the row's timestep."""
    scheduler = sampler(name, timestep_spacing="leading")
    table = schedule.tabulate(scheduler, Run(4))
    cumulated = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).numpy()
    alpha = cumulated[table.timesteps[table.index].astype(int)]
    p, q = alpha**0.5, (1 - alpha) ** 0.5
    expected = np.stack([np.ones(4), q / p] if name == "EulerDiscreteScheduler" else [p, q], axis=1)
    np.testing.assert_allclose(table.start, expected, rtol=1e-4)
    later = schedule.tabulate(scheduler, Run(4, begin=1))
    assert np.array_equal(later.start, table.start[1:])


def test_rows_of_a_first_order_slice_are_the_slice_of_the_rows() -> None:
    scheduler = sampler("EulerAncestralDiscreteScheduler")
    whole, later = schedule.tabulate(scheduler, Run(4)), schedule.tabulate(scheduler, Run(4, begin=2))
    assert all(np.array_equal(getattr(whole, column)[2:], getattr(later, column)) for column in ("m", "v", "w"))


@pytest.mark.parametrize(
    ("name", "noisy"),
    [("EulerDiscreteScheduler", 0), ("EulerAncestralDiscreteScheduler", 3), ("DDIMScheduler", 0), ("LCMScheduler", 3)],
)
def test_noise_is_drawn_where_the_sampler_uses_it(name: str, noisy: int) -> None:
    table = schedule.tabulate(sampler(name, timestep_spacing="trailing"), Run(4))
    assert table.draws_noise.tolist() == [i < noisy for i in range(4)]
    assert table.w.any(axis=1).tolist() == [i < noisy for i in range(4)]


def test_one_K_for_several_step_counts_and_tasks(checkpoints: dict[str, Path]) -> None:
    """One step of a multistep solver needs no history, nor does the last one alone."""
    name = "DPMSolverMultistepScheduler"
    checkpoint = Checkpoint(checkpoints["sd"], None, scheduler={"_class_name": name})
    made = tables.make(checkpoint, Requested("", {}, "fp32", steps=(1, 2, 8)))
    entries = {task: [(one.entry.steps, one.entry.begin) for one in of.values()] for task, of in made.items()}
    assert entries == {
        "text-to-image": [(1, 0), (2, 0), (8, 0)],
        "image-to-image": [(steps, begin) for steps in (1, 2, 8) for begin in range(steps)],
    }
    scheduler = load.scheduler(checkpoint)
    assert [schedule.tabulate(scheduler, Run(steps)).K for steps in (1, 2, 8)] == [1, 1, 2]
    for entry, table in ((one.entry, one.table) for of in made.values() for one in of.values()):
        assert (table.K, table.rows) == (2, entry.rows) == (2, entry.steps - entry.begin)
    for steps in (1, 2, 8):
        wide = schedule.pad(made["text-to-image"][str(steps)].table, 4)
        assert wide.K == 4
        for replaced in (False, True):
            assert largest_error(wide, follow(scheduler, Run(steps), replaced)[1], replaced) <= BOUND


@pytest.mark.parametrize("limit", [0.5, 10.0, 1000.0])
def test_a_sampler_that_clips_is_refused(limit: float) -> None:
    clipping = sampler("DDIMScheduler", clip_sample=True, clip_sample_range=limit)
    with pytest.raises(InputError, match=r"DDIMScheduler has clip_sample=True in its config.*set clip_sample to false"):
        schedule.tabulate(clipping, Run(4))


def test_thresholding_is_named_if_it_is_the_reason() -> None:
    with pytest.raises(InputError, match=r"DPMSolverMultistepScheduler has thresholding=True in its config"):
        schedule.tabulate(sampler("DPMSolverMultistepScheduler", thresholding=True), Run(2))
    with pytest.raises(InputError, match=r"has clip_sample=True and thresholding=True .*set clip_sample and thres"):
        schedule.tabulate(sampler("DDPMScheduler", thresholding=True, clip_sample=True), Run(2))
    with pytest.raises(InputError, match="has no rows after 2 of 2 steps"):  # not the reason
        schedule.tabulate(sampler("DDIMScheduler", clip_sample=True), Run(2, begin=2))


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
        schedule.tabulate(cls(), Run(2))


def test_a_class_of_the_checkpoints_author_has_the_table_of_its_parent() -> None:
    """It stands in another module than the code that draws."""

    class Renamed(diffusers.EulerAncestralDiscreteScheduler):
        pass

    table = check_table(Renamed(**OF_EULER), Run(3))
    expected = schedule.tabulate(diffusers.EulerAncestralDiscreteScheduler(**OF_EULER), Run(3))
    assert np.array_equal(table.w, expected.w) and table.w.any()


def test_steps_that_the_scheduler_itself_refuses() -> None:
    with pytest.raises(InputError, match=r"LCMScheduler cannot be used .* set_timesteps\(51\): .*original_steps"):
        schedule.tabulate(sampler("LCMScheduler"), Run(51))


def test_a_package_that_a_scheduler_needs_and_that_is_missing(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "DPMSolverSDEScheduler", "StableDiffusionPipeline", **BETAS)
    with pytest.raises(InputError, match=r"DPMSolverSDEScheduler (cannot be loaded .*torchsde|adds noise).*another"):
        schedule.tabulate(load.scheduler(checkpoint), Run(2))


def test_a_table_leaves_the_scheduler_as_it_was() -> None:
    scheduler = sampler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    before, config = scheduler.timesteps.clone(), dict(scheduler.config)
    first, second = schedule.tabulate(scheduler, Run(2)), schedule.tabulate(scheduler, Run(2))
    assert all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(first)
    )
    assert torch.equal(scheduler.timesteps, before) and dict(scheduler.config) == config


def test_the_module_draws_as_before_after_a_refusal() -> None:
    before = euler_ancestral.randn_tensor
    schedule.tabulate(sampler("EulerAncestralDiscreteScheduler"), Run(2))
    with pytest.raises(InputError):
        schedule.tabulate(sampler("EulerAncestralDiscreteScheduler", prediction_type="sample"), Run(2))
    assert euler_ancestral.randn_tensor is before


@pytest.fixture(scope="module")
def pipeline(checkpoints: dict[str, Path]) -> Any:
    pipeline = load.pipeline(Checkpoint(checkpoints["sd"], None))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_recording(pipeline: Any, checkpoint: Checkpoint, table: Table, steps: int) -> None:
    """Run diffusers' pipeline: the table must make each recorded result of what was recorded before it."""
    family, shape = checkpoint.family, Shape(64, 64, 1, table.K)
    layout = Layout(family, checkpoint.configs, tasks.find(["text-to-image"]), [shape])
    chain = layout.chain(layout.tasks[0], shape, {}, {})
    call = Call("text-to-image", str(steps), [], ["a"], 5, steps)
    timesteps: list[float] = []
    hook = pipeline.unet.time_proj.register_forward_hook(lambda _, args, __: timesteps.append(float(args[0][0])))
    with torch.inference_mode():
        got = record_call(pipeline, checkpoint, chain, call)
    hook.remove()
    assert table.timesteps[table.index].tolist() == timesteps and len(got["latents"]) == table.rows
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).numpy()
    np.testing.assert_allclose(got["latents"][0], table.init_noise_sigma * start, rtol=1e-6)
    assert (table.draws_noise <= got["noise"].any(axis=(1, 2, 3, 4))).all()
    state = np.zeros((table.K, *got["latents"][0].shape))
    for i in range(table.rows):
        state[0] = got["latents"][i]
        state = np.einsum("jk,k...->j...", table.m[i], state)
        state += np.einsum("j,...->j...", table.v[i], got["prediction"][i])
        state += np.einsum("j,...->j...", table.w[i], got["noise"][i])
        wanted = got["next_latents"][i]
        assert np.linalg.norm(state[0] - wanted) <= BOUND * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "TCDScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"),  # eta, generator
        *("HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),  # neither
    ],
)
def test_the_pipeline_is_recorded_with_any_scheduler(name: str, pipeline: Any, checkpoints: dict[str, Path]) -> None:
    pipeline.scheduler = sampler(name, skip_prk_steps=True, steps_offset=1)
    table = schedule.tabulate(pipeline.scheduler, Run(3))
    check_recording(pipeline, Checkpoint(checkpoints["sd"], None), table, 3)
    assert "step" not in vars(pipeline.scheduler)


def test_a_call_that_changes_the_scheduler_does_not_change_the_next(
    pipeline: Any, checkpoints: dict[str, Path]
) -> None:
    """DPMSolverSinglestepScheduler sets `lower_order_final` for an odd number of steps, and leaves it so."""
    pipeline.scheduler = sampler("DPMSolverSinglestepScheduler", final_sigmas_type="sigma_min")
    checkpoint = Checkpoint(checkpoints["sd"], None)
    made = {steps: schedule.tabulate(pipeline.scheduler, Run(steps)) for steps in (3, 2)}
    for steps, table in made.items():
        check_recording(pipeline, checkpoint, table, steps)
    assert not pipeline.scheduler.config.lower_order_final


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"steps_offset": 0, "timestep_spacing": "leading"}),
        ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}),
        ("PNDMScheduler", {"steps_offset": 0, "skip_prk_steps": True}),
    ],
)
def test_the_scheduler_is_the_one_that_the_pipeline_ends_up_with(
    name: str, options: dict[str, Any], pipeline: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """An outdated config is drawn by StableDiffusionPipeline as if it were a newer one."""
    found = load.scheduler(write(tmp_path, name, "StableDiffusionPipeline", **{**BETAS, **options}))
    parts = {**pipeline.components, "scheduler": sampler(name, **options)}
    theirs = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    check_recording(theirs, Checkpoint(checkpoints["sd"], None), schedule.tabulate(found, Run(2)), 2)
    assert dict(found.config) == {**theirs.scheduler.config, "_use_default_values": found.config._use_default_values}


def test_the_pipeline_of_sdxl_leaves_its_scheduler(tmp_path: Path) -> None:
    options = {**BETAS, "steps_offset": 0, "clip_sample": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = load.scheduler(write(tmp_path, "DDIMScheduler", "StableDiffusionXLPipeline", **options))
    assert (found.config.steps_offset, found.config.clip_sample) == (0, True)
    with pytest.raises(InputError, match="clip_sample=True"):
        schedule.tabulate(found, Run(1))
