"""Measure the progress of work whose phases nest and repeat, as one fraction that never goes back."""

import math
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Phase:
    steps: int
    parent: "_Phase | None" = None
    done: int = 0
    inside: "list[_Phase]" = field(default_factory=list)  # the phases that began during the current step

    def fraction(self) -> float:
        # The number of phases in a step is unknown: each takes up to half of the rest of the step.
        left = math.prod(1 - phase.fraction() / 2 for phase in self.inside)
        return min(1.0, (self.done + 1 - left) / self.steps)


class Fractions:
    """Turns the starts, steps and ends of phases into the fraction that is done: 0 to 1."""

    def __init__(self) -> None:
        self._outer: list[_Phase] = []
        self._running: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase, inside the current step of `parent` if that is running."""
        outer = self._running.get(parent) if parent else None
        phase = self._running[name] = _Phase(max(1, steps), outer)
        (outer.inside if outer else self._outer).append(phase)

    def step(self, name: str, index: int) -> None:
        """Count the step of this number, from 0, as done."""
        phase = self._running.get(name)
        if phase and index >= phase.done:
            phase.done = min(phase.steps, index + 1)
            phase.inside.clear()

    def finish(self, name: str) -> None:
        """End a phase, even if it did not make every step."""
        if phase := self._running.pop(name, None):
            phase.done = phase.steps
            phase.inside.clear()

    @property
    def value(self) -> float:
        """Return the fraction that is done."""
        return 1 - math.prod(1 - phase.fraction() for phase in self._outer)
