"""The tasks: one module each, discovered automatically, with one constant `TASK`; to add a task, add a file.

A task is data and needs no torch: the stages that it adds to those of every chain, and the calls that verify it.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from turbochain.runtime.bundle.manifest import Draw, Feed, Stage
from turbochain.runtime.errors import InputError


@dataclass(frozen=True)
class Trial:
    """A call that verification makes of a chain; its prompt and seed are the recorder's."""

    steps: int
    strength: float | None = None
    guided: bool = False
    mode: str = ""  # of a ControlNet or T2I-Adapter


@dataclass(frozen=True)
class Task:
    """What a chain of one task has beside the text encoders, the UNet, the sampler's step and the VAE's decoder."""

    name: str  # as the manifest has it
    before: tuple[Stage, ...] = ()  # stages of the image, before the loop
    after_step: tuple[Stage, ...] = ()  # after the sampler's step, in every step
    feeds: Mapping[str, Feed] = field(default_factory=dict)
    draws: tuple[Draw, ...] = ()  # before those of the steps
    latents: str = "next_latents"  # what a step leaves: it is decoded, and the next one reads it
    starts_late: bool = False  # whether a run may begin at any row, as `strength` says
    plain_latents: bool = False  # whether all of its pipelines scale an image's latents by the scaling_factor alone
    whole_is_noise: bool = False  # whether a run from the first row begins with noise alone, as text-to-image does
    of: str = ""  # the task whose pipeline it is recorded from, if diffusers has none of its own
    streams: bool = False  # whether its chain makes one row of several frames at a time: see `Chain.stream`

    @property
    def pipeline(self) -> str:
        """Return the task that names its pipeline in `Family.pipelines`."""
        return self.of or self.name

    def trials(self, steps: Sequence[int], stream: int = 0) -> list[Trial]:
        """Return what a chain with tables for these step counts is tried with: all of them, and guidance once.

        A stream with `stream` rows is tried once: its tables are parts of another task's.
        """
        if self.streams:
            return [Trial(max(steps), strength(max(steps), stream))]
        if not self.starts_late:
            return [*(Trial(n) for n in steps), Trial(min(steps), guided=True)]
        most = max(steps)
        few = min(n for n in steps if n > 1 or n == most)
        made = most if self.whole_is_noise else max(1, most - 1)  # the start of a whole run is another one
        return [Trial(most, strength(most, made)), Trial(few, strength(few, 1), guided=True)]


def strength(steps: int, made: int) -> float:
    """Return a strength at which `made` steps are made."""
    return 1.0 if made == steps else (made + 0.5) / steps


def load() -> dict[str, Task]:
    """Return every task by its name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {m.TASK.name: m.TASK for m in modules}


def find(names: Sequence[str]) -> list[Task]:
    """Return the tasks with these names, each once; the InputError for an unknown name lists them all."""
    known = load()
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"task {unknown[0]!r}: choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
