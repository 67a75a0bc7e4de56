"""A call is recorded with any scheduler, and the table is made from the scheduler that the pipeline has then."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from samplers import BETAS, BOUND, sampler, write

from turbochain.export import load, schedule, tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Shape
from turbochain.export.recorded_calls import Call
from turbochain.export.recording import record_call
from turbochain.export.run import SamplerRun
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import InputError
from turbochain.runtime.chain.tables import Table

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, about numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


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
    table = schedule.tabulate(pipeline.scheduler, SamplerRun(3))
    check_recording(pipeline, Checkpoint(checkpoints["sd"], None), table, 3)
    assert "step" not in vars(pipeline.scheduler)


def test_a_call_that_changes_the_scheduler_does_not_change_the_next(
    pipeline: Any, checkpoints: dict[str, Path]
) -> None:
    """DPMSolverSinglestepScheduler sets `lower_order_final` for an odd number of steps, and leaves it so."""
    pipeline.scheduler = sampler("DPMSolverSinglestepScheduler", final_sigmas_type="sigma_min")
    checkpoint = Checkpoint(checkpoints["sd"], None)
    made = {steps: schedule.tabulate(pipeline.scheduler, SamplerRun(steps)) for steps in (3, 2)}
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
    check_recording(theirs, Checkpoint(checkpoints["sd"], None), schedule.tabulate(found, SamplerRun(2)), 2)
    assert dict(found.config) == {**theirs.scheduler.config, "_use_default_values": found.config._use_default_values}


def test_the_pipeline_of_sdxl_leaves_its_scheduler(tmp_path: Path) -> None:
    options = {**BETAS, "steps_offset": 0, "clip_sample": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = load.scheduler(write(tmp_path, "DDIMScheduler", "StableDiffusionXLPipeline", **options))
    assert (found.config.steps_offset, found.config.clip_sample) == (0, True)
    with pytest.raises(InputError, match="clip_sample=True"):
        schedule.tabulate(found, SamplerRun(1))
