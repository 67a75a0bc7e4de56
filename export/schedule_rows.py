"""The rows of bundle format 1; goes when `tables.schedules` writes `schedule.tabulate`'s tables.

A first-order sampler step is linear in what it reads: `next = a·sample + b·prediction + c·noise`
(Karras et al. 2022, algorithms 1 and 2, for the Euler samplers). The coefficients are found by probing
`scheduler.step` with unit inputs, so that no formula of any scheduler is written down here; a whole
trajectory is then compared, and a scheduler that is not of this form is refused.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from turbochain.runtime.bundle.manifest import Schedule, Step
from turbochain.runtime.errors import InputError

_PROBE = (1, 4, 8, 8)  # any shape would do; 256 values make the least-squares estimate of c exact


def tabulate_rows(scheduler: Any, steps: int, embed: Callable[[torch.Tensor], torch.Tensor]) -> Schedule:
    """The table of `scheduler` (a diffusers scheduler) for `steps` steps.

    `embed` is the UNet's `time_proj`: timesteps [1] → sinusoidal embedding [1, n] fp32. Raises InputError
    for a scheduler whose step is not linear in sample, prediction and noise alone.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    if "generator" not in inspect.signature(scheduler.step).parameters:  # those of higher order that draw nothing
        raise _refusal(scheduler, "is not a first-order linear sampler")
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        raise _refusal(scheduler, f"evaluates the network {len(scheduler.timesteps)} times in {steps} steps")
    state, rows = copy.deepcopy(scheduler), []
    for t in scheduler.timesteps:
        rows.append(_probe(state, t, embed))
        _step(state, t, torch.zeros(_PROBE), torch.zeros(_PROBE), _generator())
    last = max((i for i, row in enumerate(rows) if row.c), default=-1)
    # A draw that nothing after it can notice is left out: Euler ancestral draws for its last step, where c = 0.
    rows = [row if i <= last else dataclasses.replace(row, draws_noise=False) for i, row in enumerate(rows)]
    schedule = Schedule(p=0.0, q=float(scheduler.init_noise_sigma), rows=tuple(rows))
    _check_trajectory(scheduler, schedule)
    return schedule


def _probe(scheduler: Any, t: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    zeros, ones = torch.zeros(_PROBE), torch.ones(_PROBE)
    scale = copy.deepcopy(scheduler).scale_model_input(ones, t)
    generator = _generator()
    with_noise = _step(copy.deepcopy(scheduler), t, zeros, zeros, generator)
    noise = torch.randn(_PROBE, generator=_generator())
    c = float((with_noise.double() * noise).sum() / (noise.double() ** 2).sum())
    # The noise has the same draw in every probe, so its part is taken off again.
    a = _step(copy.deepcopy(scheduler), t, ones, zeros, _generator()) - with_noise
    b = _step(copy.deepcopy(scheduler), t, zeros, ones, _generator()) - with_noise
    return Step(
        timestep=float(t),
        timestep_embedding=tuple(embed(t.reshape(1)).flatten().tolist()),
        input_scale=float(scale.mean()),
        a=float(a.double().mean()),
        b=float(b.double().mean()),
        c=c,
        draws_noise=not torch.equal(generator.get_state(), _generator().get_state()),
    )


def _step(
    scheduler: Any,
    t: torch.Tensor,
    sample: torch.Tensor,
    prediction: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    scheduler.scale_model_input(sample, t)
    return scheduler.step(prediction, t, sample, generator=generator, return_dict=False)[0]


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _check_trajectory(scheduler: Any, schedule: Schedule) -> None:
    """Follow the scheduler through a run with random predictions: the table must give the same samples."""
    random, theirs, ours = _generator(), _generator(), _generator()
    x = schedule.q * torch.randn(_PROBE, generator=random)
    y = x.double()
    for t, row in zip(scheduler.timesteps, schedule.rows, strict=True):
        prediction = torch.randn(_PROBE, generator=random)
        x = _step(scheduler, t, x, prediction, theirs)
        y = row.a * y + row.b * prediction
        if row.draws_noise:
            y = y + row.c * torch.randn(_PROBE, generator=ours)
        if not torch.allclose(x.double(), y, rtol=1e-4, atol=1e-4 * float(x.abs().max())):
            raise _refusal(scheduler, "is not a first-order linear sampler")


def _refusal(scheduler: Any, reason: str) -> InputError:
    return InputError(
        f"the scheduler {type(scheduler).__name__} {reason}, so it cannot be written as a table; put a first-order "
        "one (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDIMScheduler, LCMScheduler) in the "
        "checkpoint's scheduler/scheduler_config.json"
    )
