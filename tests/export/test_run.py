"""Tables of runs that begin late, or have explicit timesteps, an eta or a strength, against diffusers' schedulers."""

import inspect
import logging
from collections.abc import Iterator

import diffusers
import pytest
from samplers import BOUND, sampler
from test_schedule import LINEAR, check_table, follow, largest_error

from turbochain.export import schedule
from turbochain.export.run import SamplerRun
from turbochain.export.sampler import TAKE_ETA, TAKE_TIMESTEPS
from turbochain.runtime import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers' own, about numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DMD2 = (999, 749, 499, 249)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """LCM warns of timesteps that it was not trained on."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", LINEAR)
def test_every_beginning(name: str) -> None:
    """Image-to-image from each of up to four steps and some of more, and what inpainting blends in after each row."""
    scheduler = sampler(name, skip_prk_steps=True)
    for run in [SamplerRun(steps, begin) for steps in (1, 2, 3, 4) for begin in range(steps)]:
        check_table(scheduler, run)
    for run in (SamplerRun(8, 5), SamplerRun(20), SamplerRun(20, 14)):
        check_table(scheduler, run)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_beginning_with_other_sigmas(name: str) -> None:
    check_table(sampler(name, use_karras_sigmas=True), SamplerRun(4, begin=2))


def test_one_K_for_runs_that_begin_later() -> None:
    """The last step alone of a multistep solver needs no history."""
    scheduler = sampler("UniPCMultistepScheduler")
    runs = (SamplerRun(4), SamplerRun(4, begin=1), SamplerRun(4, begin=3))
    assert [schedule.tabulate(scheduler, run).K for run in runs] == [3, 2, 1]
    for run in runs:
        table = schedule.pad(schedule.tabulate(scheduler, run), 3)
        assert table.K == 3
        assert largest_error(table, follow(scheduler, run, False)[1], False) <= BOUND


def test_a_first_timestep_that_comes_twice() -> None:
    """Without set_begin_index diffusers begins at its second row, and fails after the last one."""
    pytest.importorskip("scipy")
    scheduler = sampler("DPMSolverMultistepScheduler", use_beta_sigmas=True)
    with pytest.raises(IndexError):
        follow(scheduler, SamplerRun(32), False)
    with pytest.raises(InputError, match="step: index 33 is out of bounds"):
        schedule.tabulate(scheduler, SamplerRun(32))
    table = check_table(scheduler, SamplerRun(32, begin=0))
    assert table.timesteps[table.index][:2].tolist() == [998, 998]


@pytest.mark.parametrize("timesteps", [DMD2, (399,), (800, 400)], ids=str)
@pytest.mark.parametrize("name", TAKE_TIMESTEPS)
def test_explicit_timesteps(name: str, timesteps: tuple[int, ...]) -> None:
    scheduler = sampler(name)
    table = check_table(scheduler, SamplerRun(len(timesteps), timesteps=timesteps))
    assert table.timesteps[0] == timesteps[0]
    if scheduler.order == 1:
        assert table.timesteps[table.index].tolist() == list(timesteps)
        for begin in range(len(timesteps)):
            later = check_table(scheduler, SamplerRun(len(timesteps), begin, timesteps))
            assert later.timesteps[later.index].tolist() == list(timesteps[begin:])
    else:
        with pytest.raises(InputError, match=f"{name} makes more than one row of each explicit timestep"):
            schedule.tabulate(scheduler, SamplerRun(len(timesteps), 1, timesteps))


def parameters(name: str, method: str) -> set[str]:
    return set(inspect.signature(getattr(getattr(diffusers, name), method)).parameters)


def test_who_takes_what() -> None:
    """The classes that an error names are those that diffusers has."""
    assert {name for name in LINEAR if "timesteps" in parameters(name, "set_timesteps")} == set(TAKE_TIMESTEPS)
    assert {name for name in LINEAR if "eta" in parameters(name, "step")} == set(TAKE_ETA)


@pytest.mark.parametrize(
    ("name", "run", "reason"),
    [
        (
            "DDIMScheduler",
            SamplerRun(1, timesteps=(399,)),
            r"takes no explicit timesteps, and timesteps=\[399\] .* takes it .EulerD",
        ),
        ("EulerDiscreteScheduler", SamplerRun(2, eta=0.3), r"takes no eta, and eta=0\.3 was .* .DDIMScheduler, TCD"),
        ("EulerDiscreteScheduler", SamplerRun(2, strength=0.5), r"takes no strength, .* .LCMScheduler"),
        ("TCDScheduler", SamplerRun(2, strength=0.5), r"takes no strength, .* .LCMScheduler"),
        (
            "EulerDiscreteScheduler",
            SamplerRun(2, original_steps=9),
            "unexpected keyword argument 'original_inference_steps'",
        ),
        ("LCMScheduler", SamplerRun(2, timesteps=(249, 999)), "custom_timesteps` must be in descending order"),
        (
            "LCMScheduler",
            SamplerRun(1, timesteps=(1000,)),
            r"has timesteps up to 999, .*, and timesteps=\[1000\] was asked for",
        ),
        (
            "LCMScheduler",
            SamplerRun(4, strength=0.05),
            "`original_steps x strength`: 50 x 0.05 is smaller than.*: give it other arguments, or name",
        ),
        ("LCMScheduler", SamplerRun(1, original_steps=1001), "`original_steps`: 1001 cannot be larger than"),
        ("LCMScheduler", SamplerRun(5, original_steps=4), "`original_steps x strength`: 4 x 1.0 is smaller than"),
        ("LCMScheduler", SamplerRun(4, begin=4), "has no rows after 4 of 4 steps"),
        ("TCDScheduler", SamplerRun(2, eta=1.5), "step: gamma must be less than or equal to 1.0"),
    ],
    ids=lambda value: "" if isinstance(value, SamplerRun) else value,
)
def test_what_a_scheduler_does_not_take(name: str, run: SamplerRun, reason: str) -> None:
    with pytest.raises(InputError, match=f"the scheduler {name} .*{reason}"):
        schedule.tabulate(sampler(name), run)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="4 steps do not fit the explicit timesteps 800, 400, of which there are 2"):
        SamplerRun(4, timesteps=(800, 400))
    with pytest.raises(InputError, match=r"a run that skips 1 steps has strength=0\.5"):
        SamplerRun(4, begin=1, strength=0.5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", TAKE_ETA)
def test_eta(name: str, eta: float) -> None:
    """Noise is drawn in every row but the last of TCD, which DDIM has not."""
    scheduler = sampler(name)
    for begin in (None, 1):
        table = check_table(scheduler, SamplerRun(4, begin, eta=eta))
        drawn = table.draws_noise.tolist()
        assert drawn[:-1] == [True] * (len(drawn) - 1) and drawn[-1] == table.w[-1].any()
    assert not schedule.tabulate(scheduler, SamplerRun(4)).draws_noise.any()


def test_timesteps_with_an_eta() -> None:
    """Hyper-SD's: TCD over timesteps of its own."""
    for timesteps in ((800,), (800, 400)):
        check_table(sampler("TCDScheduler"), SamplerRun(len(timesteps), timesteps=timesteps, eta=1.0))


@pytest.mark.parametrize(
    ("run", "timesteps"),
    [
        (SamplerRun(4, strength=0.8), [799, 599, 399, 199]),
        (SamplerRun(4, strength=0.5), [499, 379, 259, 139]),
        (SamplerRun(4, strength=0.5, original_steps=100), [499, 379, 249, 129]),
        (SamplerRun(4, original_steps=100), [999, 749, 499, 249]),
        (SamplerRun(4, timesteps=DMD2, strength=0.5), [499, 249]),
    ],
    ids=str,
)
def test_the_strength_of_latent_consistency(run: SamplerRun, timesteps: list[int]) -> None:
    """Against what LatentConsistencyModelImg2ImgPipeline gives its UNet, and decodes."""
    table = check_table(sampler("LCMScheduler"), run)
    assert table.timesteps[table.index].tolist() == timesteps
