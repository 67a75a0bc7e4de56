"""A chain that can be drawn with, the plans of its calls, and what its encoders made in earlier ones."""

import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from turbochain.runtime.adapters import Adapters
from turbochain.runtime.backends.contract import Executor
from turbochain.runtime.bundle.manifest import Stage, Tensor
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.plan import Plan
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.cache import StageCache
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
    _encoders: dict[frozenset[str], list[Stage]] = field(default_factory=dict)

    def encoders(self, modes: frozenset[str]) -> list[Stage]:
        """Return the stages before the loop that read only what is fed: what they make of it can be kept.

        Not one that makes what goes round the loop: it is another value when the call ends.
        """
        if modes not in self._encoders:
            fed, overwritten = self.chain.read(modes), {*self.chain.chain.carry.values()}
            self._encoders[modes] = [
                s
                for s in self.chain.chain.stages
                if s.when in ("prompt", "image")
                and s.runs(modes)
                and all(t.name in fed for t in wiring.inputs(s, self.chain.graphs))
                and overwritten.isdisjoint(self.made(s))
            ]
        return self._encoders[modes]

    def made(self, stage: Stage) -> list[str]:
        """Return the names of what a stage makes, in the order of its graph's outputs."""
        return [t.name for t in wiring.outputs(stage, self.chain.graphs)]

    def keys(self, stage: Stage, fed: Arrays, adapters: Adapters) -> list[Hashable]:
        """Return a key for what an encoder reads for each picture of a batch: equal keys, equal results.

        The names of the chain do not count: a prompt and a negative prompt of one text are the same.
        """
        whole, rows = hashlib.blake2b(), []
        state = adapters.state(self.chain.graphs[stage.graph].component)
        for tensor in wiring.inputs(stage, self.chain.graphs):
            feed = self.chain.chain.feeds[tensor.name]
            if feed.is_ == "adapter":
                continue  # `state` says what it holds
            value = fed[tensor.name]
            if feed.is_ in ("number", "column"):
                whole.update(value.tobytes())
            else:
                rows.append(value)
        found = []
        for row in range(self.chain.batch):
            one = whole.copy()
            for value in rows:
                one.update(value[row].tobytes())
            found.append((stage.graph, state, one.digest()))
        return list(found)

    def result(self, request: Request) -> str:
        """Return the name of what a call wants: the picture, or the latents."""
        return self.chain.chain.output if request.decode or self.chain.latents is None else self.chain.latents

    def plan(self, request: Request, given: tuple[str, ...]) -> Planned:
        """Return the plan of a request, made once of its kind.

        `given`: what is uploaded in place of the stages that make it. What the other encoders make is read back.
        """
        key = (request.table, request.modes, request.decode, given)
        if key not in self._plans:
            ran = [s for s in self.encoders(request.modes) if not set(self.made(s)) <= {*given}]
            plan = self.chain.plan(
                request.table,
                modes=request.modes,
                given=given,
                downloads=[*self.chain.chain.carry, *(name for stage in ran for name in self.made(stage))],
                decode=request.decode,
            )
            tensors, read = plan.tensors(self.chain.graphs), self.chain.read(request.modes)
            held = frozenset(t for name, t in tensors.items() if name in read and read[name].when == "held")
            self._plans[key] = Planned(plan, held, frozenset(plan.written(self.chain.graphs)))
        return self._plans[key]


class Held:
    """The buffers that keep their values from call to call; chains share them by name and shape. The caller holds a
    lock."""

    def __init__(self) -> None:
        self._known: dict[Tensor, Hashable] = {}  # buffer → the state of its adapters, () if it has none
        self._stream: Callable[[], object | None] = lambda: None

    def begin(self, executor: Executor, ready: ReadyChain, planned: Planned, adapters: Adapters) -> None:
        """Let those that a plan reads hold the active adapters; the others hold zeros, unless a plan left something in
        them."""
        states = {tensor: adapters.fed(ready.chain, tensor.name) for tensor in planned.held}
        for tensor, state in states.items():
            if self._known.get(tensor) != state:
                name = tensor.name
                value = adapters.value(ready.chain, name) if state else ready.feeds.zeros(name)
                executor.hold(planned.plan, {name: value})
                self._known[tensor] = state

    def lose(self, tensors: Iterable[Tensor]) -> None:
        """Let these start from zeros the next time that a plan reads them: something else is, or will be, in them."""
        for tensor in tensors:
            self._known.pop(tensor, None)

    def lose_all_of(self, chain: OpenChain) -> None:
        """Let every buffer that a verification of the chain may have written start from zeros."""
        self.lose(chain.tensors.values())
        self.lose(tensor for graph in chain.graphs.values() for tensor in (*graph.inputs, *graph.outputs))

    def clear(self) -> None:
        """Let all start from zeros."""
        self._known.clear()

    def take(self, stream: object) -> None:
        """Let a stream be the one that uses them; InputError if another one does, and has not been closed."""
        if self._stream() is not None:
            raise InputError(
                "another stream of this pipeline is open, and a pipeline holds the frames of one: close that one, or "
                "load a second pipeline"
            )
        self._stream = weakref.ref(stream)

    def release(self, stream: object) -> None:
        """Let another stream use them, if this one does."""
        if self._stream() is stream:
            self._stream = lambda: None


Missing = tuple[Stage, list[Hashable]]
"""An encoder that has to run, and the key of each picture of the batch."""


@dataclass(frozen=True)
class Caches:
    """What the encoders of all chains made of prompts and pictures. The caller holds a lock."""

    prompt: StageCache
    image: StageCache

    def known(
        self, ready: ReadyChain, request: Request, fed: Arrays, adapters: Adapters
    ) -> tuple[dict[str, np.ndarray], list[Missing]]:
        """Return what needs no encoder, by its name in the chain, and the encoders that have to run."""
        of_caller = {name for name, _ in request.embeds}  # in some modes these are feeds, of zeros
        given = {n: value for n, value in fed.items() if n in of_caller or n not in ready.chain.chain.feeds}
        missing = []
        for stage in ready.encoders(request.modes):
            names = ready.made(stage)
            if all(name in given for name in names):
                continue
            keys = ready.keys(stage, fed, adapters)
            if (made := self._of(stage).get(keys)) is None:
                missing.append((stage, keys))
            else:
                given |= dict(zip(names, made.values(), strict=True))
        return given, missing

    def keep(self, ready: ReadyChain, missing: Sequence[Missing], made: Arrays) -> None:
        """Keep what the missing encoders made, by its name in the chain, under the names that their graphs have."""
        for stage, keys in missing:
            own = (t.name for t in ready.chain.graphs[stage.graph].outputs)
            self._of(stage).put(keys, {n: made[name] for n, name in zip(own, ready.made(stage), strict=True)})

    def clear(self) -> None:
        """Forget everything."""
        self.prompt.clear()
        self.image.clear()

    def _of(self, stage: Stage) -> StageCache:
        return self.prompt if stage.when == "prompt" else self.image
