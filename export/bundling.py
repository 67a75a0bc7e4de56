"""Checkpoint → bundle: the export's phases, in a folder that is renamed when it is whole."""

import shutil
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.export.phases.phases import SMALL, Phases, now, versions
from turbochain.export.phases.resume import STATE, Finished, empty, leave_nothing
from turbochain.runtime.bundle import hashing, manifest, strict_json, writing
from turbochain.runtime.bundle.manifest import FORMAT_VERSION, REFERENCE, TEXT_TO_IMAGE, Checkpoint, Graph, Manifest
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import InputError, NoSpace, PictureError

FIRST_VERSION = "0.1.0"  # that reads format 2
VERSIONS = ("turbochain", "torch", "diffusers", "transformers", "onnx", "onnxscript", "numpy", "tokenizers")


def copy(source: Bundle, folder: Path, output: Path) -> None:
    """Make the bundle `output` a copy of another, without its engines, in the locked `folder`."""
    try:
        source.check_files()
        for name in (*source.manifest.files, "bundle.json"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with writing.atomic_write(target) as file, (source.path / name).open("rb") as original:
                shutil.copyfileobj(original, file, 2**20)
        Bundle.open(folder).check_files(full=True)
    except (InputError, OSError):
        leave_nothing(folder)
        raise
    writing.install_directory(folder, output)


def export(
    phases: Phases, source: str, vae: str | None, request: dict[str, Any], folder: Path, output: Path, force: bool
) -> None:
    """Make the bundle `output` of what `request` asks for, in the locked `folder`; `source`, `vae` as in `build`.

    What cannot be built leaves nothing behind; a full disk, a failure or a kill leaves what was finished, if anything.
    """
    try:
        _export(phases, {"source": source, "vae": vae, "force": force}, request, folder)
    except (InputError, PictureError) as error:
        if not isinstance(error, NoSpace) or not (folder / STATE).exists():
            leave_nothing(folder)
        raise
    finally:
        phases.release()
    writing.install_directory(folder, output)


def _export(phases: Phases, given: dict[str, Any], request: dict[str, Any], folder: Path) -> None:
    _require_export()
    state = Finished(folder, request)
    common = {"request": request, "folder": str(folder)}
    prepared = state.once(
        "prepare",
        lambda: phases.run("load", "turbochain.export.jobs:prepare", keep=True, **given, **common),
        lambda result: [*result["terms"], *(t["file"] for t in result["tokenizers"].values())],
    )
    common["prepared"] = prepared
    run = partial(phases.run, keep=sum(w["size"] for w in prepared["weights"].values()) <= SMALL)
    remedies = state.once(
        "reference",
        lambda: run("reference", "turbochain.export.jobs:reference", **common),
        lambda _: [REFERENCE, prepared["chain"]["tables_file"]],
    )
    _tell(phases, remedies)
    graphs: dict[str, Any] = {}
    for component in (*prepared["components"], ""):
        phase = f"export {component or 'sampler'}"
        graphs |= state.once(
            phase,
            partial(run, phase, "turbochain.export.jobs:graphs", component=component, remedies=remedies, **common),
            lambda made: [file for g in made.values() for file in (g["file"], *g["data"], g["names"])],
        )
    text = strict_json.write(_manifest(request, prepared, graphs, state.records()))
    keep = {*state.records(), "bundle.json"}
    writing.write_atomically(folder / "bundle.json", text)
    Bundle.open(folder)
    empty(folder, keep)


def _tell(phases: Phases, remedies: dict[str, dict[str, Any]]) -> None:
    """Say what keeps each stage in fp16's range, where any stage was to be in fp16."""
    judged = {name: r["phrase"] for name, r in remedies.items() if r["phrase"] or r["precision"] == "fp16"}
    for name, phrase in judged.items():
        if not phases.quiet:
            print(f"range of fp16: {name:<17} {phrase or 'fits'}", file=sys.stderr)


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
    records: dict[str, hashing.FileRecord],
) -> Manifest:
    checkpoint = Checkpoint(
        source=request["source"],
        revision=prepared["commit"],
        variant=prepared["variant"],
        pipeline_class=prepared["pipeline_class"],
        license=prepared["license"],
        weights={k: hashing.FileRecord(**v) for k, v in prepared["weights"].items()},
    )
    chain = _as(manifest.Chain, prepared["chain"])
    return Manifest(
        format_version=FORMAT_VERSION,
        family=prepared["family"],
        checkpoint=checkpoint,
        request=request,
        created=now(),
        created_by=versions(*VERSIONS),
        requires=_requires(chain),
        tokenizers={k: _as(manifest.TokenizerFile, v) for k, v in prepared["tokenizers"].items()},
        graphs={k: _as(Graph, v) for k, v in graphs.items()},
        chains={TEXT_TO_IMAGE: chain},
        files=records,
    )


def _requires(chain: manifest.Chain) -> dict[str, str]:
    """Return the optional features of the format that a chain uses → the first turbochain that reads them."""
    used = {
        "multistep": chain.K > 1,
        "modes": bool(chain.modes),
        "keep": bool(chain.keep),
        "wires": any(stage.wires for stage in chain.stages),
    }
    return {name: FIRST_VERSION for name, is_used in used.items() if is_used}


def _as(kind: Any, value: Any) -> Any:
    """Return JSON values that a phase returned as a dataclass."""
    made, problems = strict_json.convert(kind, value)
    assert not problems, problems
    return made
