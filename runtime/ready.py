"""A chain that can be drawn with, and the plans of its calls."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from turbochain.runtime.bundle.manifest import Stage, Tensor
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.plan import Plan
from turbochain.runtime.inputs.feeds import Feeds
from turbochain.runtime.request import Request

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Planned:
    """A plan, and which buffers it leaves to others or takes from them."""

    plan: Plan
    held: frozenset[Tensor]  # that it reads, and that keep their values from call to call
    written: frozenset[Tensor]  # that it fills with something of its own


@dataclass
class ReadyChain:
    """A chain whose files are hashed and whose engine is verified, with what its calls share."""

    chain: OpenChain
    feeds: Feeds
    _plans: dict[Hashable, Planned] = field(default_factory=dict)

    def made_of_prompts(self, modes: frozenset[str]) -> list[str]:
        """Return what the stages of the prompt make in these modes."""
        return [t.name for s in self._prompt_stages(modes) for t in wiring.outputs(s, self.chain.graphs)]

    def prompt_keys(self, modes: frozenset[str], feeds: Arrays) -> list[Hashable]:
        """Return for each picture of a batch all that the stages of the prompt read: equal keys make equal text.

        Numbers and constants of the whole call are the same for all rows.
        """
        inputs = (t.name for s in self._prompt_stages(modes) for t in wiring.inputs(s, self.chain.graphs))
        read, of = [n for n in dict.fromkeys(inputs) if n in feeds], self.chain.chain.feeds
        numbers = {n for n in read if of[n].is_ == "number"}
        return [
            (self.chain.name, modes, *((feeds[n] if n in numbers else feeds[n][row]).tobytes() for n in read))
            for row in range(self.chain.batch)
        ]

    def result(self, request: Request) -> str:
        """Return the name of what a call wants: the picture, or the latents."""
        return self.chain.chain.output if request.decode or self.chain.latents is None else self.chain.latents

    def _prompt_stages(self, modes: frozenset[str]) -> list[Stage]:
        return [s for s in self.chain.chain.stages if s.when == "prompt" and s.runs(modes)]

    def plan(self, request: Request, known: tuple[str, ...] | None) -> Planned:
        """Return the plan of a request, made once of its kind.

        `known`: what is uploaded in place of the stages of the prompt that make it; None: nothing, and what all of
        them make is read back.
        """
        key = (request.steps, request.modes, request.decode, known)
        if key not in self._plans:
            plan = self.chain.plan(
                request.steps,
                modes=request.modes,
                given=known or (),
                downloads=[*self.chain.chain.carry, *(self.made_of_prompts(request.modes) if known is None else ())],
                decode=request.decode,
            )
            tensors, feeds = plan.tensors(self.chain.graphs), self.chain.chain.feeds
            held = frozenset(t for name, t in tensors.items() if name in feeds and feeds[name].when == "held")
            self._plans[key] = Planned(plan, held, frozenset(plan.written(self.chain.graphs)))
        return self._plans[key]
