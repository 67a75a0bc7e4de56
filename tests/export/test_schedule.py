"""Tables against the schedulers themselves: every class that diffusers exports has a true table, or is refused."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as image_to_image
from samplers import BETAS, BOUND, OF_EULER, sampler, write

from turbochain.export import load, schedule, tables
from turbochain.export.requested import Requested
from turbochain.export.run import SamplerRun
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import InputError
from turbochain.runtime.chain.tables import ARRAYS, Table

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, about numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHAPE = (2, 4, 3, 5)
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


def prepared(scheduler: Any, run: SamplerRun) -> tuple[Any, torch.Tensor]:
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


def follow(scheduler: Any, run: SamplerRun, replaced: bool) -> tuple[tuple[float, float] | None, list[Step]]:
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


def check_table(scheduler: Any, run: SamplerRun) -> Table:
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
        assert not all(torch.isfinite(step.made).all() for step in follow(scheduler, SamplerRun(steps), False)[1])
    elif "which the diffusers pipelines use" in message:
        missing = message.split(" has no ")[1].split(", which")[0].split(", ")
        assert not any(hasattr(scheduler, attribute) for attribute in missing)
    elif "in every step" in message:
        with pytest.raises(TypeError, match="missing"):
            follow(scheduler, SamplerRun(steps), False)[1]
    else:
        assert "cannot be used as the diffusers pipelines do" in message
        with pytest.raises(Exception):  # noqa: B017 (whatever it raises)
            follow(scheduler, SamplerRun(steps), False)[1]


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
                check_table(scheduler, SamplerRun(steps))
                if steps == 4:
                    check_table(scheduler, SamplerRun(steps, begin=1))
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
    table = schedule.tabulate(sampler(name, **options), SamplerRun(8))
    assert (table.K, table.rows) == (K, evaluations)
    assert {name: getattr(table, name).dtype.name for name in (*ARRAYS, "timesteps")} == {
        **dict.fromkeys(("m", "v", "w", "input_scale", "start", "init_noise_sigma", "timesteps"), "float32"),
        "draws_noise": "bool",
        "index": "int32",
    }
    assert table.m.shape == (evaluations, K, K) and table.v.shape == table.w.shape == (evaluations, K)
    assert table.start.shape == (evaluations, 2) and table.init_noise_sigma.shape == ()


def test_timesteps_that_come_twice_are_stored_once() -> None:
    table = schedule.tabulate(sampler("HeunDiscreteScheduler"), SamplerRun(3))
    assert table.index.tolist() == [0, 1, 1, 2, 2] and len(table.timesteps) == 3


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_where_image_to_image_starts(name: str) -> None:
    """Against the formula p·z + q·ε of the training process: σ or √ᾱ and √(1 − ᾱ) at the row's timestep."""
    scheduler = sampler(name, timestep_spacing="leading")
    table = schedule.tabulate(scheduler, SamplerRun(4))
    cumulated = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).numpy()
    alpha = cumulated[table.timesteps[table.index].astype(int)]
    p, q = alpha**0.5, (1 - alpha) ** 0.5
    expected = np.stack([np.ones(4), q / p] if name == "EulerDiscreteScheduler" else [p, q], axis=1)
    np.testing.assert_allclose(table.start, expected, rtol=1e-4)
    later = schedule.tabulate(scheduler, SamplerRun(4, begin=1))
    assert np.array_equal(later.start, table.start[1:])


def test_rows_of_a_first_order_slice_are_the_slice_of_the_rows() -> None:
    scheduler = sampler("EulerAncestralDiscreteScheduler")
    whole, later = schedule.tabulate(scheduler, SamplerRun(4)), schedule.tabulate(scheduler, SamplerRun(4, begin=2))
    assert all(np.array_equal(getattr(whole, column)[2:], getattr(later, column)) for column in ("m", "v", "w"))


@pytest.mark.parametrize(
    ("name", "noisy"),
    [("EulerDiscreteScheduler", 0), ("EulerAncestralDiscreteScheduler", 3), ("DDIMScheduler", 0), ("LCMScheduler", 3)],
)
def test_noise_is_drawn_where_the_sampler_uses_it(name: str, noisy: int) -> None:
    table = schedule.tabulate(sampler(name, timestep_spacing="trailing"), SamplerRun(4))
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
    assert [schedule.tabulate(scheduler, SamplerRun(steps)).K for steps in (1, 2, 8)] == [1, 1, 2]
    for entry, table in ((one.entry, one.table) for of in made.values() for one in of.values()):
        assert (table.K, table.rows) == (2, entry.rows) == (2, entry.steps - entry.begin)
    for steps in (1, 2, 8):
        wide = schedule.pad(made["text-to-image"][str(steps)].table, 4)
        assert wide.K == 4
        for replaced in (False, True):
            assert largest_error(wide, follow(scheduler, SamplerRun(steps), replaced)[1], replaced) <= BOUND


def test_a_class_of_the_checkpoints_author_has_the_table_of_its_parent() -> None:
    """It stands in another module than the code that draws."""

    class Renamed(diffusers.EulerAncestralDiscreteScheduler):
        pass

    table = check_table(Renamed(**OF_EULER), SamplerRun(3))
    expected = schedule.tabulate(diffusers.EulerAncestralDiscreteScheduler(**OF_EULER), SamplerRun(3))
    assert np.array_equal(table.w, expected.w) and table.w.any()


def test_a_table_leaves_the_scheduler_as_it_was() -> None:
    scheduler = sampler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    before, config = scheduler.timesteps.clone(), dict(scheduler.config)
    first, second = schedule.tabulate(scheduler, SamplerRun(2)), schedule.tabulate(scheduler, SamplerRun(2))
    assert all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(first)
    )
    assert torch.equal(scheduler.timesteps, before) and dict(scheduler.config) == config
