"""A chain of a bundle, opened: its tensors, graphs, files and tables in one place."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Chain, Feed, Graph, Tensor, TokenizerFile
from turbochain.runtime.chain import tables, wiring
from turbochain.runtime.chain.plan import Plan, plan
from turbochain.runtime.chain.tables import Table
from turbochain.runtime.errors import InputError

if TYPE_CHECKING:
    from turbochain.runtime.bundle.opened import Bundle


@dataclass(frozen=True)
class OpenChain:
    """A chain whose wiring is sound; `Bundle.open_chain` makes one."""

    bundle: "Bundle"
    name: str

    @property
    def chain(self) -> Chain:
        """Return the manifest's entry."""
        return self.bundle.manifest.chains[self.name]

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """Return the manifest's entry of every graph, in the order in which they first run."""
        return {name: self.bundle.manifest.graphs[name] for name in self.chain.graphs}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name in the chain."""
        return wiring.tensors(self.chain, self.graphs)

    @property
    def batch(self) -> int:
        """Return the number of pictures per pass."""
        return self.chain.batch

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width of a picture in pixels."""
        height, width = self.chain.size
        return height, width

    @cached_property
    def steps(self) -> list[int]:
        """Return the step counts that there are tables for, ascending."""
        return sorted({entry.steps for entry in self.chain.tables.values()})

    def feeds(self, kind: str) -> list[str]:
        """Return the names of the feeds of a kind (see `FEEDS` in the manifest)."""
        return [name for name, feed in self.chain.feeds.items() if feed.is_ == kind]

    @cached_property
    def tokenizers(self) -> dict[str, TokenizerFile]:
        """Return the tokenizer of each feed of ids."""
        return {name: self.bundle.manifest.tokenizers[name] for name in self.feeds("ids")}

    @property
    def first_noise(self) -> str | None:
        """Return the noise that a caller may give: the first that is drawn for each picture of a call."""
        feeds, draws = self.chain.feeds, (d for d in self.chain.draws if d.per == "picture" and not d.discarded)
        return next((d.name for d in draws if d.name in feeds and feeds[d.name].when == "call"), None)

    @cached_property
    def latents(self) -> str | None:
        """Return the name of what goes round the loop and is no history: the latents, [B, 4, H/8, W/8] fp32."""
        history = self.feeds("history")
        return next((made for made, read in self.chain.carry.items() if read not in history), None)

    def read(self, modes: Collection[str] = ()) -> dict[str, Feed]:
        """Return the feeds that a call with these modes reads, by name."""
        stages = [s for s in self.chain.stages if s.runs(modes)]
        wanted = {t.name for s in stages for t in wiring.inputs(s, self.graphs)}
        return {n: feed for n, feed in wiring.fed(self.chain, self.graphs, modes).items() if n in wanted}

    @property
    def files(self) -> list[str]:
        """Return every file of the bundle that a call reads: graphs, tokenizers, tables."""
        graphs = [file for graph in self.graphs.values() for file in graph.files]
        return [*dict.fromkeys(graphs), *(t.file for t in self.tokenizers.values()), self.chain.tables_file]

    @cached_property
    def digest(self) -> str:
        """Return one digest (SHA-256, hex) of all that a call reads: manifest entries, graphs, tables, tokenizers."""
        files = {file: self.bundle.manifest.files[file].sha256 for file in self.files}
        # What int8 needs is added for the first engine in int8, and others stay verified: see Bundle.graph_digest.
        graphs = {name: replace(graph, quantization="") for name, graph in self.graphs.items()}
        value = [strict_json.plain(v) for v in (self.chain, graphs, self.tokenizers, files)]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def digests(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Return the digest of every graph's files that an engine with these options reads."""
        return {name: self.bundle.graph_digest(name, options) for name in self.graphs}

    def weight_bytes(self) -> int:
        """Return the size on disk of the graphs' external data, each file counted once."""
        return sum(self.bundle.manifest.files[f].size for f in {f for g in self.graphs.values() for f in g.data})

    def find(
        self, steps: object, *, begin: int = 0, guidance_scale: float | None = None, strength: float | None = None
    ) -> str:
        """Return the name of a table; InputError if the bundle has none. The arguments are those of `TableEntry`."""
        wanted = (begin, guidance_scale, strength)
        if not isinstance(steps, bool) and isinstance(steps, int | np.integer):
            for name, entry in self.chain.tables.items():
                if entry.steps == steps and (entry.begin, entry.guidance_scale, entry.strength) == wanted:
                    return name
        choices = ", ".join(map(str, self.steps))
        raise InputError(
            f"num_inference_steps={steps!r}: this bundle was built for these step counts: {choices}; "
            "build another with build-engine SOURCE --steps"
        )

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Read every table by its name in the file, which is hashed first; BundleError if one is not as it should
        be."""
        self.bundle.check_files([self.chain.tables_file])
        columns = {n: self.tensors[n] for n in self.feeds("column") if n not in tables.OWN}
        return tables.read(self.bundle.path / self.chain.tables_file, self.chain, columns)

    def columns(self, table: str) -> dict[str, np.ndarray]:
        """Return a call's constants, name → [rows, *shape] fp32; [1, *shape] for the whole call, or for a stream."""
        found = self.tables[table]
        return {name: found.column(name).reshape(-1, *self.tensors[name].shape) for name in self.feeds("column")}

    def passes(self, table: str) -> int:
        """Return how often a call that follows a table goes round the loop: once per row, or once for a stream."""
        return 1 if self.chain.stream else self.chain.tables[table].rows

    def plan(self, table: str, **more: Any) -> Plan:
        """Return the plan of a call that follows a table; `more` as in `plan.plan`."""
        return plan(self.chain, self.graphs, self.passes(table), table=f"{self.name}/{table}", **more)

    def problems(self) -> list[str]:
        """Return where the chain, whose wiring is sound, contradicts its tensors and tokenizers."""
        return [f"chain {self.name}: {problem}" for problem in self._problems()]

    def _problems(self) -> list[str]:
        chain, output = self.chain, self.tensors[self.chain.output]
        found = [] if self.steps else ["there is no table"]
        for name, entry in chain.tables.items():
            if entry.steps < 1 or entry.rows < 1 or not 0 <= entry.begin < entry.steps:
                found.append(
                    f"the table {name} has {entry.steps} steps, {entry.rows} rows, and begins at {entry.begin}"
                )
        if output.dtype != "uint8" or output.shape != (chain.batch, *chain.size, 3):
            expected = f"uint8 {[chain.batch, *chain.size, 3]}"
            found.append(f"the output {output.name} is {output.dtype} {list(output.shape)}, and not {expected}")
        for name in self.feeds("ids"):
            tokenizer = self.bundle.manifest.tokenizers.get(name)
            if tokenizer is None or tokenizer.max_length != self.tensors[name].shape[-1]:
                gives = f"gives {tokenizer.max_length} ids" if tokenizer else "is missing"
                found.append(f"the tokenizer for {name} {gives}, which is not what the chain reads")
            elif short := [token for token, count in tokenizer.expansions.items() if count < 2]:
                found.append(f"the tokenizer for {name} expands {short[0]} to fewer than two tokens")
        found += [f"the draw {d.name} has no such tensor" for d in chain.draws if d.name not in self.tensors]
        drawn, noise = sorted(d.name for d in chain.draws if not d.discarded), sorted(self.feeds("noise"))
        if drawn != noise:
            found.append(f"it draws {drawn}, and its noise is {noise}")
        if (chain.K > 1) != bool(self.feeds("history")):
            found.append(f"K is {chain.K}, and its history is {self.feeds('history')}")
        shapes: dict[str, tuple[int, ...]] = {"m": (chain.K, chain.K), "v": (chain.K,), "w": (chain.K,)}
        if chain.stream:
            of_rows = [self.tensors[n].shape[0] for n in self.feeds("noise") if chain.feeds[n].when == "step"]
            is_one = (chain.K, chain.batch, chain.modes, of_rows) == (1, 1, (), [chain.stream])
            if chain.stream < 2 or not is_one:
                found.append(
                    f"it is no stream of {chain.stream} frames, each a picture with noise of its own in each row"
                )
            shapes = dict.fromkeys((*shapes, "input_scale"), (chain.stream, 1, 1, 1))
            lost = [name for name, entry in chain.tables.items() if entry.rows != chain.stream]
            found += [f"the table {name} lacks the stream's {chain.stream} rows" for name in lost]
        for name, when in tables.OWN.items():
            feed, tensor, shape = chain.feeds.get(name), self.tensors.get(name), shapes.get(name, (1,))
            if feed and tensor and (feed.when, tensor.dtype, tensor.shape) != (when, "float32", shape):
                has = f"{tensor.dtype} {list(tensor.shape)} for each {feed.when}"
                found.append(f"the column {name} is {has}, and not float32 {list(shape)} for each {when}")
        for name in self.feeds("history"):
            tensor = self.tensors[name]
            if tensor.shape[0] != chain.K - 1:
                found.append(f"{name} is {list(tensor.shape)}, and K = {chain.K} makes it {chain.K - 1} tensors")
        return found
