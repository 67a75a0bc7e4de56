"""An opened bundle: its manifest checked, its files hashed before anything parses them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from turbochain.runtime.bundle import external_data, hashing, hub, quantization, strict_json, writing
from turbochain.runtime.bundle.manifest import (
    DTYPES,
    PRECISIONS,
    REFERENCE,
    Engine,
    Manifest,
)
from turbochain.runtime.bundle.paths import blobs, resolve_inside
from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import BundleError, InputError


@dataclass(frozen=True)
class Bundle:
    """A bundle directory whose manifest is valid and whose chains are wired soundly: files, manifest and engines."""

    path: Path
    manifest: Manifest
    trusts_engines: bool = True  # whether engines that came with it are used: those in its engines/

    @classmethod
    def open(cls, path: str | Path, *, trust_engines: bool = False) -> "Bundle":
        """Read and check the manifest; raises BundleError with every problem that it has.

        `path`: a folder, or a hub id (see `hub.folder`). Engines that came with a bundle from the hub are not used
        unless `trust_engines`.
        """
        folder = hub.folder(path, engines=trust_engines)
        if not folder.is_dir():
            if folder.exists():
                raise BundleError(f"{path} is not a bundle: it is a file; build one: build-engine SOURCE -o FOLDER")
            raise BundleError(
                f"{path} is not a bundle: there is no such folder; build one: build-engine SOURCE -o {path}"
            )
        trusted = trust_engines or blobs(folder) is None
        bundle = cls(folder, strict_json.read(Manifest, folder / "bundle.json"), trusted)
        problems = bundle._problems()
        if problems:
            raise BundleError(f"{folder / 'bundle.json'} is not valid: " + "; ".join(problems))
        return bundle

    def _problems(self) -> list[str]:
        m = self.manifest
        problems = [] if m.chains else ["there is no chain"]
        named = {REFERENCE: "the reference"}
        for name, graph in m.graphs.items():
            named |= dict.fromkeys(graph.all_files, f"graph {name}")
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

    def open_chain(self, name: str | None = None) -> OpenChain:
        """Return a chain with all that it needs (None: the first one); InputError if there is none of this name."""
        chains = self.manifest.chains
        if name is not None and (not isinstance(name, str) or name not in chains):
            raise InputError(
                f"chain={name!r}: this bundle has {', '.join(chains)}; choose one of these, or build another with "
                "build-engine SOURCE"
            )
        return OpenChain(self, next(iter(chains)) if name is None else name)

    def sizes(self, task: str) -> list[tuple[int, int]]:
        """Return the sizes (height, width) in pixels that a task is built for; InputError if it is not built."""
        found = [self.open_chain(name).size for name, chain in self.manifest.chains.items() if chain.task == task]
        if not found:
            has = ", ".join(dict.fromkeys(chain.task for chain in self.manifest.chains.values()))
            raise InputError(
                f"this bundle was built for {has}, and not for {task}: build another with build-engine SOURCE "
                f"--tasks {task}"
            )
        return list(dict.fromkeys(found))

    def find_chain(self, task: str, size: tuple[int, int], count: int) -> str:
        """Return the name of a task's chain for a size: the one with the fewest pictures per pass that are enough for
        `count`."""
        sizes, chains = self.sizes(task), self.manifest.chains
        if size not in sizes:
            built = ", ".join(f"{width}x{height}" for height, width in sizes)
            raise InputError(
                f"height={size[0]}, width={size[1]}: this bundle is built for {built}; build another with "
                f"build-engine SOURCE --size {size[1]}x{size[0]}"
            )
        batches = {name: c.batch for name, c in chains.items() if c.task == task and tuple(c.size) == size}
        enough = [name for name, batch in batches.items() if batch >= count]
        return min(enough, key=batches.__getitem__) if enough else max(batches, key=batches.__getitem__)

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

    def check_form(self, name: str, form: bytes) -> None:
        """Raise BundleError if a form of a graph (ONNX, an engine's) reads anything but the graph's own data files.

        They are found from the folder of the bundle's graph, wherever the form itself is kept.
        """
        entry = self.manifest.graphs[name]
        external_data.check_form(self.path, entry.file, entry.data, form)

    def plain(self, graph_name: str) -> Path:
        """Return the folder in which a graph's files, already hashed, are no symbolic links; for a library to read.

        That is the bundle's own folder. For a bundle in the hub's cache it is one in the user's cache, with hard links,
        or copies if the file system has none: libraries refuse data that lies in another folder than the .onnx file.
        Raises InputError if that cannot be written.
        """
        if blobs(self.path) is None:
            return self.path
        folder = hashing.user_cache() / "bundles" / self.id
        for name in self.manifest.graphs[graph_name].files:
            source, target = resolve_inside(self.path, name), folder / name
            if not self._is_plain(folder, name, source):
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                writing.link(source, target)
                if not os.path.samefile(source, target):
                    hashing.check(folder, name, self.manifest.files[name], full=False)
        return folder

    def _is_plain(self, folder: Path, name: str, source: Path) -> bool:
        """Return whether the folder has a bundle's file, itself or as a copy."""
        try:
            if not os.path.islink(folder / name) and os.path.samefile(folder / name, source):
                return True
            hashing.check(folder, name, self.manifest.files[name], full=False)
        except (OSError, BundleError):
            return False
        return True

    def graph_digest(self, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> str:
        """Return one digest for the files of a graph that an engine with these options reads.

        It is the SHA-256 over their SHA-256 digests in order (hex). In int8, the last one is the graph's description.
        """
        graph = self.manifest.graphs[name]
        described = [graph.quantization] if graph.quantization and quantization.in_int8(graph, options) else []
        joined = "".join(self.manifest.files[f].sha256 for f in (*graph.files, *described))
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
