"""An opened bundle: its manifest checked, its files hashed before anything parses them."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.bundle import external_data, hashing, strict_json
from turbochain.runtime.bundle.manifest import (
    DTYPES,
    PRECISIONS,
    REFERENCE,
    TEXT_TO_IMAGE,
    Chain,
    Engine,
    Manifest,
    Schedule,
    Tensor,
)
from turbochain.runtime.chain import wiring
from turbochain.runtime.errors import BundleError, InputError


@dataclass(frozen=True)
class Bundle:
    """A bundle directory whose manifest is valid and whose chains are wired soundly."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Read and check the manifest; raises BundleError with every problem that it has."""
        path = Path(path)
        if not path.is_dir():
            raise BundleError(
                f"{path} is not a bundle: there is no such folder; build one: build-engine SOURCE -o {path}"
            )
        bundle = cls(path, strict_json.read(Manifest, path / "bundle.json"))
        problems = bundle._problems()
        if problems:
            raise BundleError(f"{path / 'bundle.json'} is not valid: " + "; ".join(problems))
        return bundle

    def _problems(self) -> list[str]:
        m = self.manifest
        problems = [f"there is no chain {TEXT_TO_IMAGE!r}"] if TEXT_TO_IMAGE not in m.chains else []
        named = {REFERENCE: "the reference"}
        for name, graph in m.graphs.items():
            named |= dict.fromkeys((*graph.files, graph.names), f"graph {name}")
            for t in (*graph.inputs, *graph.outputs):
                if t.dtype not in DTYPES or any(size < 1 for size in t.shape):
                    problems.append(f"graph {name}: {t.name} has dtype {t.dtype} and shape {list(t.shape)}")
        named |= {t.file: f"tokenizer {name}" for name, t in m.tokenizers.items()}
        problems += [f"{who} names {file}, which is not in files" for file, who in named.items() if file not in m.files]
        problems += [
            f"graph {n} has the precision {g.precision}" for n, g in m.graphs.items() if g.precision not in PRECISIONS
        ]
        for name, chain in m.chains.items():
            problems += wiring.wiring_problems(name, chain, m.graphs)
            if name == TEXT_TO_IMAGE:
                problems += [
                    f"the schedule for {steps} steps has {len(schedule.rows)} rows"
                    for steps, schedule in chain.schedules.items()
                    if steps != str(len(schedule.rows))
                ]
        return problems or self._text_to_image_problems()

    def _text_to_image_problems(self) -> list[str]:
        """What the chain, its wiring being sound, does not agree with the tokenizers and schedules about."""
        chain, tensors = self.chain, self.tensors
        problems = [] if chain.schedules else ["there is no schedule"]
        if tensors[chain.output].dtype != "uint8" or len(tensors[chain.output].shape) != 4:
            problems.append(f"the output {chain.output} is no picture: it should be uint8 [B, H, W, 3]")
        if not chain.carry:
            problems.append("the chain carries nothing from one step to the next")
        for name in {*chain.inputs, *self.manifest.tokenizers} - {"latents"}:
            length = self.manifest.tokenizers[name].max_length if name in self.manifest.tokenizers else None
            if name not in chain.inputs or length != tensors[name].shape[-1]:
                problems.append(f"the tokenizer for {name} gives {length} ids, which is not what the chain reads")
        for steps, schedule in chain.schedules.items():
            for column in chain.table_inputs:
                wanted = math.prod(tensors[column].shape)
                if any(np.size(getattr(row, column, ())) != wanted for row in schedule.rows):
                    problems.append(f"the schedule for {steps} steps should have {wanted} values a row in {column}")
        return problems

    @property
    def chain(self) -> Chain:
        """The text-to-image chain."""
        return self.manifest.chains[TEXT_TO_IMAGE]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every buffer of the text-to-image chain by name."""
        return wiring.buffers(self.chain, self.manifest.graphs)

    @property
    def batch(self) -> int:
        """Pictures per pass."""
        return self.tensors[self.chain.output].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        _, height, width, _ = self.tensors[self.chain.output].shape
        return height, width

    @property
    def steps(self) -> list[int]:
        """The step counts that the bundle has tables for, ascending."""
        return sorted(map(int, self.chain.schedules))

    def schedule(self, steps: object) -> Schedule:
        """The table for `steps` steps; InputError where the bundle has none."""
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps not in self.steps:
            choices = ", ".join(map(str, self.steps))
            raise InputError(f"num_inference_steps={steps!r}: this bundle has tables for {choices} steps")
        return self.chain.schedules[str(steps)]

    def check_files(self, names: Iterable[str] | None = None, *, full: bool = False) -> None:
        """Hash the named files (default: all) and see that no graph reads outside the bundle.

        `full` hashes large files and reads graphs even if a stamp says what is in them. Raises BundleError.
        """
        names = set(self.manifest.files if names is None else names)
        hashing.check_all(self.path, {n: self.manifest.files[n] for n in sorted(names)}, full=full)
        for graph in self.manifest.graphs.values():
            if graph.file in names:
                known = None if full else self.manifest.files[graph.file].sha256
                external_data.check_external(self.path, graph.file, graph.data, known)

    def graph_digest(self, name: str) -> str:
        """One digest for a graph's files: SHA-256 over their SHA-256 digests in order (hex)."""
        graph = self.manifest.graphs[name]
        joined = "".join(self.manifest.files[f].sha256 for f in graph.files)
        return hashlib.sha256(joined.encode()).hexdigest()

    def graph_digests(self) -> dict[str, str]:
        """`graph_digest` of every graph."""
        return {name: self.graph_digest(name) for name in self.manifest.graphs}

    def weight_bytes(self) -> int:
        """Return the size on disk of the data files of the text-to-image chain's graphs; a shared one counts once."""
        m = self.manifest
        return sum(m.files[file].size for file in {f for g in self.chain.graphs for f in m.graphs[g].data})

    def engines(self) -> dict[str, Engine | BundleError]:
        """Every engine in the bundle by its folder's name; a damaged one is its error."""
        found: dict[str, Engine | BundleError] = {}
        for folder in sorted((self.path / "engines").glob("*/")):
            if folder.name.startswith("."):
                continue  # one being built
            try:
                found[folder.name] = strict_json.read(Engine, folder / "engine.json")
            except BundleError as error:
                found[folder.name] = error
        return found

    def columns(self, steps: int) -> dict[str, Any]:
        """The schedule's columns as rows of arrays: name → [steps, *shape] fp32; see also `engine.feeds`."""
        rows = self.schedule(steps).rows
        return {
            n: np.array([getattr(row, n) for row in rows], np.float32).reshape(steps, *self.tensors[n].shape)
            for n in self.chain.table_inputs
        }
