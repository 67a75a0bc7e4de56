"""An opened bundle: its manifest checked, its files hashed before anything parses them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turbochain.runtime.bundle import external_data, hashing, strict_json
from turbochain.runtime.bundle.manifest import (
    DTYPES,
    PRECISIONS,
    REFERENCE,
    TEXT_TO_IMAGE,
    Engine,
    Manifest,
)
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import BundleError, InputError


@dataclass(frozen=True)
class Bundle:
    """A bundle directory whose manifest is valid and whose chains are wired soundly: files, manifest and engines."""

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
            if graph.precision not in PRECISIONS:
                problems.append(f"graph {name} has the precision {graph.precision}")
        named |= {t.file: f"tokenizer {name}" for name, t in m.tokenizers.items()}
        named |= {chain.tables_file: f"chain {name}" for name, chain in m.chains.items()}
        problems += [f"{who} names {file}, which is not in files" for file, who in named.items() if file not in m.files]
        for name, chain in m.chains.items():
            found = wiring.problems(name, chain, m.graphs)
            problems += found or self.open_chain(name).problems()
        return problems

    def open_chain(self, name: str = TEXT_TO_IMAGE) -> OpenChain:
        """Return a chain with all that it needs; InputError if the bundle has no chain of this name."""
        if name not in self.manifest.chains:
            raise InputError(
                f"chain={name!r}: this bundle has {', '.join(self.manifest.chains)}; build one that has it with "
                "build-engine SOURCE"
            )
        return OpenChain(self, name)

    @property
    def id(self) -> str:
        """Return the bundle's identity: SHA-256 (hex) over the names, sizes and digests of its files."""
        records = {name: [r.size, r.sha256] for name, r in sorted(self.manifest.files.items())}
        return hashlib.sha256(json.dumps(records).encode()).hexdigest()

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
        """Return one digest for a graph's files: SHA-256 over their SHA-256 digests in order (hex)."""
        graph = self.manifest.graphs[name]
        joined = "".join(self.manifest.files[f].sha256 for f in graph.files)
        return hashlib.sha256(joined.encode()).hexdigest()

    def engines(self, folder: Path | None = None) -> dict[str, Engine | BundleError]:
        """Return every engine in `folder` (default: the bundle's engines/) by name; a damaged one is its error."""
        found: dict[str, Engine | BundleError] = {}
        for engine in sorted((folder or self.path / "engines").glob("*/")):
            if engine.name.startswith("."):
                continue  # one that is being built
            try:
                found[engine.name] = strict_json.read(Engine, engine / "engine.json")
            except BundleError as error:
                found[engine.name] = error
        return found
