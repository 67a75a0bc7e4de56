"""Checkpoint → bundle: the export's phases, in a folder that is renamed when it is whole."""

import json
import shutil
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.export.controls import KINDS
from turbochain.export.order import ExportOrder
from turbochain.export.phases.phases import SMALL, Phases, now, versions
from turbochain.export.phases.resume import STATE, Finished, empty, leave_nothing
from turbochain.export.prepared import Prepared
from turbochain.export.remedies import Remedy
from turbochain.export.requested import Requested
from turbochain.export.sources.digests import MEMORY, Digests
from turbochain.runtime.bundle import hashing, strict_json, writing
from turbochain.runtime.bundle.manifest import FORMAT_VERSION, REFERENCE, Graph, Manifest
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.strict_json import convert
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
    phases: Phases, order: ExportOrder, requested: Requested, digests: Digests, folder: Path, output: Path, force: bool
) -> None:
    """Make the bundle `output` of an order and what it requests, in the locked `folder`.

    `digests`: what is known of the source's files, left in the folder. If the checkpoint cannot be exported, the
    folder is removed. If the disk is full, or a phase fails or is killed, finished phases stay for the next export.
    """
    try:
        _export(phases, order, requested, digests, folder, force)
    except (InputError, PictureError) as error:
        if not isinstance(error, NoSpace) or not (folder / STATE).exists():
            leave_nothing(folder)
        raise
    finally:
        phases.release()
    writing.install_directory(folder, output)


def _export(
    phases: Phases, order: ExportOrder, requested: Requested, digests: Digests, folder: Path, force: bool
) -> None:
    _require_export()
    state = Finished(folder, strict_json.plain(requested))
    digests.save(folder)
    common: dict[str, Any] = {"requested": requested, "folder": folder}
    job, where = "turbochain.export.jobs:prepare", {"keep": True, "online": order.online}
    load = partial(phases.run, "load", job, **where, order=order, force=force, **common)
    places = [source.local for source in order.sources.values()] + [path for path, _ in order.references]
    place = json.dumps([str(path) for path in places])  # what lies elsewhere is loaded again
    prepared = convert(Prepared, state.once(f"prepare {place}", load, lambda made: convert(Prepared, made).files))
    common["prepared"] = prepared
    run = partial(phases.run, keep=prepared.weight_bytes <= SMALL)
    judge = partial(run, "reference", "turbochain.export.jobs:reference", **common)
    recorded = [REFERENCE, *(chain.tables_file for chain in prepared.chains.values())]
    remedies = convert(dict[str, Remedy], state.once("reference", judge, lambda _: recorded))
    _tell(phases, remedies)
    graphs: dict[str, Graph] = {}
    for component in (*prepared.checkpoint.components, ""):
        phase = f"export {component or 'sampler'}"
        trace = partial(run, phase, "turbochain.export.jobs:graphs", component=component, remedies=remedies, **common)
        graphs |= convert(dict[str, Graph], state.once(phase, trace, _files))
    text = strict_json.write(_manifest(requested, prepared, graphs, state.records()))
    keep = {*state.records(), "bundle.json", MEMORY}
    writing.write_atomically(folder / "bundle.json", text)
    Bundle.open(folder)
    empty(folder, keep)


def _files(made: Any) -> list[str]:
    """Return the files that were written for graphs."""
    return [file for graph in convert(dict[str, Graph], made).values() for file in graph.all_files]


def _tell(phases: Phases, remedies: dict[str, Remedy]) -> None:
    """Print what keeps each graph in fp16's range, if any was to be in fp16."""
    judged = {name: r.phrase for name, r in remedies.items() if r.phrase or r.precision == "fp16"}
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
    requested: Requested, prepared: Prepared, graphs: dict[str, Graph], records: dict[str, hashing.FileRecord]
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        family=prepared.family.name,
        checkpoint=prepared.origin,
        request=strict_json.plain(vars(requested)),
        created=now(),
        created_by=versions(*VERSIONS),
        requires=_requires(prepared, graphs),
        tokenizers=prepared.tokenizers,
        graphs=graphs,
        chains=prepared.chains,
        files=records,
    )


def _requires(prepared: Prepared, graphs: dict[str, Graph]) -> dict[str, str]:
    """Return the optional features of the format that a bundle uses → the first turbochain that reads them."""
    chains = prepared.chains.values()
    controlled = any({kind.feature for kind in KINDS.values()} & {*graph.features} for graph in graphs.values())
    used = {
        "expansions": any(tokenizer.expansions for tokenizer in prepared.tokenizers.values()),
        "multistep": any(chain.K > 1 for chain in chains),
        "modes": any(chain.modes for chain in chains),
        "keep": any(chain.keep for chain in chains),
        "stream": any(chain.stream for chain in chains),
        "adapters": any(feed.is_ == "adapter" for chain in chains for feed in chain.feeds.values()),
        "control": controlled,
        "excerpts": controlled or len({(chain.size, chain.batch) for chain in chains if not chain.stream}) > 1,
        "wires": any(stage.wires for chain in chains for stage in chain.stages),
    }
    return {name: FIRST_VERSION for name, is_used in used.items() if is_used}
