"""A diffusers scheduler, called exactly as the diffusers pipelines call it."""

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from turbochain.export.run import SamplerRun
from turbochain.runtime.errors import InputError

_NEEDED = ("set_timesteps", "scale_model_input", "step", "add_noise", "init_noise_sigma", "order")
FOREMOST = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler")
TAKE_TIMESTEPS = (
    *("EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "HeunDiscreteScheduler"),
)
TAKE_ETA = ("DDIMScheduler", "TCDScheduler")

Draw = Callable[..., torch.Tensor]


class Sampler:
    """One run of a copy of a scheduler, from row `begin * scheduler.order` to its end; deep copies are further runs.

    Each error of the scheduler's own code becomes an InputError with its words, because its config or an argument that
    the pipelines do not give is the cause.
    """

    def __init__(self, scheduler: Any, run: SamplerRun) -> None:
        """Set the timesteps of `run`.

        Raises InputError for a scheduler that the pipelines cannot call like this, or that has no row after `begin`.
        """
        _check_interface(scheduler)
        self.name = type(scheduler).__name__
        self.scheduler = copy.deepcopy(scheduler)
        self.run, begin = run, run.begin or 0
        _check_arguments(scheduler, run)
        steps, options = _timestep_arguments(run)
        named = ", ".join([*map(str, steps), *(f"{name}={value}" for name, value in options.items())])
        with self._explained(f"set_timesteps({named})", "give it other arguments, or "):
            self.scheduler.set_timesteps(*steps, **options, device="cpu")
            self.first = begin * self.scheduler.order
            self.timesteps = torch.as_tensor(self.scheduler.timesteps)[self.first :]
            self.init_noise_sigma = float(self.scheduler.init_noise_sigma)
            if run.begin is not None:
                self._begin_at(self.first)
        if not 0 < self.timesteps.numel() == len(self.timesteps):
            raise refusal(self.name, f"has no rows after {begin} of {run.steps} steps")

    def scale(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what the network reads of `sample`; must come before each `step`."""
        with self._explained("scale_model_input"):
            return self.scheduler.scale_model_input(sample, t)

    def step(
        self, prediction: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the next sample, computed with the arguments of `prepare_extra_step_kwargs`."""
        extra = {k: v for k, v in (("eta", self.run.eta), ("generator", generator)) if k in _of_step(self.scheduler)}
        with self._explained("step"):
            made = self.scheduler.step(prediction, t, sample, **extra, return_dict=False)
        # The LCM pipelines decode `denoised`. It is the last sample too, but for explicit timesteps with a strength.
        decoded = self.run.strength is not None and t == self.timesteps[-1]
        return made[1] if decoded else made[0]

    def start(self, row: int) -> tuple[float, float]:
        """Return (p, q) of a run that begins at `row` of this one: `latents = p·image_latents + q·noise`."""
        image, noise = torch.eye(2).reshape(2, 1, 1, 1, 2)  # fp32, as the pipelines add noise
        with self._explained("add_noise"):
            self._begin_at(self.first + row)
            p, q = self.scheduler.add_noise(image, noise, self.timesteps[row : row + 1]).flatten().tolist()
        return p, q

    def _begin_at(self, row: int) -> None:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(row)

    @contextlib.contextmanager
    def _explained(self, call: str, remedy: str = "") -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # any class of diffusers, or of the checkpoint's author, may raise anything
            words = " ".join(str(error).split())[:300] or type(error).__name__
            raise refusal(
                self.name, f"cannot be used as the diffusers pipelines do: {call}: {words}", remedy
            ) from error


@contextlib.contextmanager
def drawing(scheduler: Any, replace: Callable[[Draw], Draw]) -> Iterator[None]:
    """Let the scheduler's modules draw noise through `replace(randn_tensor)` for the time being."""
    modules = {sys.modules[cls.__module__] for cls in type(scheduler).__mro__}
    originals = {module: vars(module)["randn_tensor"] for module in modules if "randn_tensor" in vars(module)}
    try:
        for module, original in originals.items():
            vars(module)["randn_tensor"] = replace(original)
        yield
    finally:
        for module, original in originals.items():
            vars(module)["randn_tensor"] = original


def refusal(name: str, reason: str, remedy: str = "") -> InputError:
    """Return the error for a scheduler that has no table; `remedy` comes before the other classes to choose."""
    others = ", ".join(other for other in FOREMOST if other != name)
    return InputError(
        f"the scheduler {name} {reason}; one that is linear in latents, prediction and noise was expected: {remedy}"
        f"name another class ({others}) with --scheduler"
    )


def require_original_steps(scheduler: Any) -> None:
    """Raise InputError if a scheduler does not take what the LatentConsistencyModel pipelines always give."""
    if "original_inference_steps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(
            f"the scheduler {type(scheduler).__name__} takes no original_inference_steps, and one that does was "
            "expected, because the LatentConsistencyModel pipelines give it: name LCMScheduler with --scheduler, or "
            "leave that out"
        )


def _check_interface(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if missing := [attribute for attribute in _NEEDED if not hasattr(scheduler, attribute)]:
        raise refusal(name, f"has no {', '.join(missing)}, which the diffusers pipelines use")
    parameters = list(inspect.signature(scheduler.step).parameters.values())[3:]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if required:
        raise refusal(name, f"needs {', '.join(required)} in every step, which the diffusers pipelines do not give")


def _timestep_arguments(run: SamplerRun) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the arguments of `set_timesteps`, as `retrieve_timesteps` of the pipelines gives them."""
    explicit = None if run.timesteps is None else list(run.timesteps)
    options = {"timesteps": explicit, "original_inference_steps": run.original_steps, "strength": run.strength}
    given = {name: value for name, value in options.items() if value is not None}
    return (run.steps,) if explicit is None else (), given


def _of_step(scheduler: Any) -> Collection[str]:
    """Return the names of the parameters of `step`."""
    return inspect.signature(scheduler.step).parameters.keys()


def _check_arguments(scheduler: Any, run: SamplerRun) -> None:
    """Raise InputError if the scheduler does not read an argument; diffusers ignores an eta without a word."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if run.timesteps is not None and "timesteps" not in accepted:
        given = f"timesteps={list(run.timesteps)}"
        raise _unread(scheduler, "explicit timesteps", given, "give --steps instead", TAKE_TIMESTEPS)
    trained = scheduler.config.get("num_train_timesteps", math.inf)
    if run.timesteps is not None and max(run.timesteps) >= trained:
        raise InputError(
            f"the scheduler {type(scheduler).__name__} has timesteps up to {trained - 1}, for which the network was "
            f"trained, and timesteps={list(run.timesteps)} was asked for: give smaller ones"
        )
    if run.eta and "eta" not in _of_step(scheduler):
        raise _unread(scheduler, "eta", f"eta={run.eta}", "give --eta 0", TAKE_ETA)
    # LatentConsistencyModelImg2ImgPipeline gives eta=None too, with which a step that takes an eta fails.
    if run.strength is not None and ("strength" not in accepted or "eta" in _of_step(scheduler)):
        remedy = "leave image-to-image out of --tasks"
        raise _unread(scheduler, "strength", f"strength={run.strength}", remedy, ("LCMScheduler",))
    if run.timesteps is not None and run.begin and scheduler.order > 1:
        raise InputError(
            f"the scheduler {type(scheduler).__name__} makes more than one row of each explicit timestep, and the "
            "pipelines would count the rows as steps: image-to-image over explicit timesteps needs a scheduler of "
            f"order 1, such as {TAKE_TIMESTEPS[0]}"
        )


def _unread(scheduler: Any, argument: str, given: str, remedy: str, classes: tuple[str, ...]) -> InputError:
    return InputError(
        f"the scheduler {type(scheduler).__name__} takes no {argument}, and {given} was asked for: {remedy}, or "
        f"name a class that takes it ({', '.join(classes)}) with --scheduler"
    )
