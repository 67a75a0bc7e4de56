"""How far work is whose phases nest and repeat, as one fraction that never goes back."""

import math
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Phase:
    steps: int
    parent: "_Phase | None" = None
    done: int = 0
    inside: "list[_Phase]" = field(default_factory=list)  # what began during the step under way

    def fraction(self) -> float:
        # Nobody says how many phases a step will hold: each takes up to half of what is left of the step.
        left = math.prod(1 - phase.fraction() / 2 for phase in self.inside)
        return min(1.0, (self.done + 1 - left) / self.steps)


class Fractions:
    """Told of every phase that starts, steps and ends, it says how much of the whole is done: 0 to 1."""

    def __init__(self) -> None:
        self._outer: list[_Phase] = []
        self._running: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside the step under way of `parent` if that runs."""
        outer = self._running.get(parent) if parent else None
        phase = self._running[name] = _Phase(max(1, steps), outer)
        (outer.inside if outer else self._outer).append(phase)

    def step(self, name: str, index: int) -> None:
        """The step of this number, from 0, is done."""
        phase = self._running.get(name)
        if phase and index >= phase.done:
            phase.done = min(phase.steps, index + 1)
            phase.inside.clear()

    def finish(self, name: str) -> None:
        """A phase ends, whether or not it made every step."""
        if phase := self._running.pop(name, None):
            phase.done = phase.steps
            phase.inside.clear()

    @property
    def value(self) -> float:
        """How much is done."""
        return 1 - math.prod(1 - phase.fraction() for phase in self._outer)
