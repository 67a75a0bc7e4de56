"""What a stage was fed and made in a recorded case, row by row."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from turbochain.runtime.bundle.manifest import Stage
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.tables import Table
from turbochain.runtime.checks.reference import SAMPLED, Case, products
from turbochain.runtime.inputs.embeds import NEGATIVE
from turbochain.runtime.inputs.guidance import GUIDANCE


class Recorded:
    """A case beside the chain that it was recorded for."""

    def __init__(
        self, chain: OpenChain, case: Case, mode: str = "", slots: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> None:
        """Read the case's table. `mode`: one that the call has beside those of the case. `slots`: what feeds those of
        adapters, by name; others are zeros."""
        self.chain, self.case, self.tensors, self.slots = chain, case, case.tensors, slots
        self.modes = case.modes | frozenset(filter(None, [mode]))
        self.table: Table = chain.tables[case.table]
        self.columns = chain.columns(case.table)

    @cached_property
    def _per_step(self) -> set[str]:
        """Return the names of what differs from row to row."""
        chain = self.chain.chain
        made = {t.name for s in chain.stages if s.when == "step" for t in wiring.outputs(s, self.chain.graphs)}
        return made | {name for name, feed in chain.feeds.items() if feed.when == "step"} | {*chain.carry.values()}

    def value(self, name: str, row: int) -> np.ndarray:
        """Return the tensor of this name in a row: from the recording, the table or the walk along it, or from the
        engine if the recording has only a sample."""
        if name in self.columns:
            column = self.columns[name]
            return column[row if len(column) > 1 else 0]
        feed = self.chain.chain.feeds.get(name)
        if feed is not None and feed.is_ == "history":
            return self._history(row)
        if name in self.slots:
            return self.slots[name]
        at = row if name in self._per_step else 0
        if (name, at) in self.case.made:
            return self.case.made[name, at]
        if name not in self.tensors:
            tensor = self.chain.tensors[name]
            return np.zeros(tensor.shape, tensor.dtype)
        return self._of_row(name, row) if name in self._per_step else self.tensors[name]

    def sample(self, name: str, row: int) -> np.ndarray | None:
        """Return the recorded sample of the tensor of this name in a row, or None if there is none."""
        found = self.tensors.get(SAMPLED + name)
        return None if found is None else found[row] if name in self._per_step else found

    def rows_of(self, stage: Stage) -> range:
        """Return the rows in which what a stage read was recorded: one, if it is not in the loop."""
        if stage.when == "end":
            last = self.chain.passes(self.case.table) - 1
            return range(last, last + 1)
        return range(len(self.tensors["prediction"]) if stage.when == "step" else 1)

    def _of_row(self, name: str, row: int) -> np.ndarray:
        """Return a recorded row; of an excerpt, the last kept row stands for the loop's last."""
        return self.tensors[name][min(row, len(self.tensors[name]) - 1)]

    def fed(self, stage: Stage) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Find what a stage reads, by the names of its graph, with the row: in every row that was recorded."""
        named = {t.name: stage.wires.get(t.name, t.name) for t in self.chain.graphs[stage.graph].inputs}
        for row in self.rows_of(stage):
            yield row, {own: self.value(name, row) for own, name in named.items()}

    def feeds(self, when: str) -> dict[str, np.ndarray]:
        """Return what the case's feeds hold, but for noise: those of a call, of every step [rows, …], or what held ones
        begin with."""
        read = self.chain.read(self.modes)
        names = [name for name, feed in read.items() if feed.when == when and feed.is_ != "noise"]
        rows = range(self.chain.passes(self.case.table))
        return {n: np.array([self.value(n, i) for i in rows]) if when == "step" else self.value(n, 0) for n in names}

    def rows(self, name: str) -> np.ndarray:
        """Return what the sampler's step read or made in each row that was recorded, [rows, B, …].

        A stream makes all rows at once; what it makes goes on to the next row, and leaves after the last one."""
        if not self.chain.chain.stream:
            return self.tensors[name][: len(self.tensors["prediction"])]
        parts = {"latents": ("all_latents",), "next_latents": ("next_stream_latents", "next_latents")}
        return np.concatenate([self.tensors[part][0] for part in parts.get(name, (name,))])[:, None]

    def _history(self, row: int) -> np.ndarray:
        """Return the K − 1 tensors besides the latents that a row begins with, fp32."""
        shape = (self.table.K - 1, *self.tensors["latents"].shape[1:])
        return self.walked[row - 1, 1:].astype(np.float32) if row else np.zeros(shape, np.float32)

    @cached_property
    def walked(self) -> np.ndarray:
        """Walk along the table in fp64 on what diffusers' scheduler was fed: the state after each row [rows, K, …].

        With guidance that is `guided_prediction`, in place of the UNet's own.
        """
        predicted = "guided_prediction" if "guided_prediction" in self.tensors else "prediction"
        latents, prediction, noise = (self.rows(k).astype(np.float64) for k in ("latents", predicted, "noise"))
        state = np.zeros((self.table.K, *latents.shape[1:]))
        states = []
        for row in range(len(latents)):
            state = np.stack([latents[row], *state[1:]])
            m, v, w = (a[row].astype(np.float64) for a in (self.table.m, self.table.v, self.table.w))
            state = np.tensordot(m, state, 1) + np.multiply.outer(v, prediction[row]) + np.multiply.outer(w, noise[row])
            states.append(state)
        return np.array(states)


def guided(chain: OpenChain, case: Case) -> Recorded:
    """Return a case without guidance as one with it, for the step alone: its negative predictions are half of its own,
    and what the rows leave is what the table makes of them."""
    own = {**case.tensors, "guidance_scale": np.array([3], np.float32)}
    own[f"{NEGATIVE}prediction"] = own["prediction"] / 2
    tensors = own | products(own)
    made = Recorded(chain, replace(case, tensors=tensors, modes=frozenset([GUIDANCE])))
    tensors["next_latents"] = made.walked[:, 0].astype(np.float32)
    return made
