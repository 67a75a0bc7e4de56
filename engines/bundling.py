"""Checkpoint → bundle: the export's phases, in a folder that is renamed when it is whole."""

import dataclasses
import json
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.engines.session import Session, now, versions
from turbochain.runtime import files, manifest
from turbochain.runtime.bundle import REFERENCE, TEXT_TO_IMAGE, Bundle
from turbochain.runtime.errors import BundleError, InputError
from turbochain.runtime.manifest import FORMAT_VERSION, Checkpoint, Graph, Manifest

VERSIONS = ("turbochain", "torch", "diffusers", "transformers", "onnx", "onnxscript", "numpy", "tokenizers")
_STATE = "state.json"


class _State:
    """`state.json` in the partial folder: what was asked, and what of it is done and with which files."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self._folder = folder
        self.value: dict[str, Any] = {"request": request, "done": {}}
        try:
            old = json.loads((folder / _STATE).read_text())
        except (OSError, ValueError):
            old = None
        if old and old.get("request") == request:
            self.value = old
        else:
            _empty(folder)

    def once(self, key: str, make: Callable[[], Any], made: Callable[[Any], list[str]]) -> Any:
        """The result of `make`, unless an earlier build did it and its files (`made`) are still as they were."""
        done = self.value["done"].get(key)
        if done and self._intact(done["files"]):
            return done["result"]
        result = make()
        records = {name: dataclasses.asdict(files.describe(self._folder / name)) for name in made(result)}
        self.value["done"][key] = {"result": result, "files": records}
        files.write_atomically(self._folder / _STATE, json.dumps(self.value))
        return result

    def _intact(self, records: dict[str, Any]) -> bool:
        try:
            files.check_all(self._folder, {n: files.FileRecord(**r) for n, r in records.items()}, full=False)
        except BundleError:
            return False
        return True

    def records(self) -> dict[str, files.FileRecord]:
        """Every file that was made, with its hash."""
        done = self.value["done"].values()
        return {name: files.FileRecord(**r) for entry in done for name, r in sorted(entry["files"].items())}


def export(session: Session, request: dict[str, Any], partial: Path, output: Path, force: bool) -> None:
    """Make the bundle `output` of what `request` asks for, in the locked folder `partial`."""
    _require_export()
    state = _State(partial, request)
    common = {"request": request, "folder": str(partial)}
    prepared = state.once(
        "prepare",
        lambda: session.run("load", "turbochain.export.jobs:prepare", force=force, **common),
        lambda result: [*result["terms"], *(t["file"] for t in result["tokenizers"].values())],
    )
    common["prepared"] = prepared
    state.once(
        "reference",
        lambda: session.run("reference", "turbochain.export.jobs:reference", **common),
        lambda _: [REFERENCE],
    )
    graphs = {
        name: state.once(
            f"graph {name}",
            lambda name=name: session.run(f"export {name}", "turbochain.export.jobs:graph", name=name, **common),
            lambda graph: [graph["file"], *graph["data"], graph["names"]],
        )
        for name in prepared["precisions"]
    }
    text = manifest.write(_manifest(request, prepared, graphs, state.records()))
    keep = {*state.records(), "bundle.json"}
    files.write_atomically(partial / "bundle.json", text)
    Bundle.open(partial)
    _empty(partial, keep)
    files.install_directory(partial, output)


def _require_export() -> None:
    missing = []
    for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(f"exporting a checkpoint needs {', '.join(missing)}: pip install 'turbochain[export]'")


def _manifest(
    request: dict[str, Any],
    prepared: dict[str, Any],
    graphs: dict[str, Any],
    records: dict[str, files.FileRecord],
) -> Manifest:
    checkpoint = Checkpoint(
        source=request["source"],
        revision=prepared["commit"],
        variant=prepared["variant"],
        pipeline_class=prepared["pipeline_class"],
        license=prepared["license"],
        weights={k: files.FileRecord(**v) for k, v in prepared["weights"].items()},
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        family=prepared["family"],
        checkpoint=checkpoint,
        request=request,
        created=now(),
        created_by=versions(*VERSIONS),
        tokenizers={k: manifest.TokenizerFile(**v) for k, v in prepared["tokenizers"].items()},
        graphs={k: Graph(**v) for k, v in graphs.items()},
        chains={TEXT_TO_IMAGE: manifest.Chain(**prepared["chain"])},
        schedules=prepared["schedules"],
        files=records,
    )


def _empty(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in `folder` but the files named in `keep`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in keep:
            path.unlink()
