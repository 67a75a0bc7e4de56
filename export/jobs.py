"""The export as three jobs, each run in a process of its own; arguments and results are plain JSON values."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbochain.export import estimate, families
from turbochain.export.families import Family, Shape, common
from turbochain.export.remedies import Remedy, decide
from turbochain.export.sources import hub, other_vae
from turbochain.export.sources.checkpoint import (
    KINDS,
    SYNTHETIC,
    Checkpoint,
    check_configs,
    is_hub_id,
    local,
    open_folder,
)
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.hashing import describe
from turbochain.runtime.errors import InputError

Progress = Callable[[int, int], None]
CheckRoom = Callable[[Family, dict[str, Any], dict[str, int], int], None]
TERMS = ("LICENSE*", "LICENCE*", "README.md")  # copied into the bundle: licence and model card


def prepare(
    progress: Progress, *, source: str, vae: str | None, request: dict[str, Any], folder: str, force: bool
) -> dict[str, Any]:
    """Get the checkpoint onto this disk, and write into `folder` everything of it that needs no tracing.

    Returns what the later jobs and the manifest need. What can be refused without loading weights is refused
    here, before the long work: first what needs no torch, then too little memory or disk (unless `force`).
    """
    shape, root = Shape(request["height"], request["width"], request["batch"]), Path(folder)

    def check_room(family: Family, configs: dict[str, Any], counts: dict[str, int], fetched: int) -> None:
        precisions = common.precisions(family, request["precision"], request.get("vae_precision"))
        needs = estimate.needs(family, configs, counts, shape, precisions, fetched)
        estimate.require(needs, root, force)

    checkpoint, commit = _open(source, vae, request, root, progress, check_room)
    family = checkpoint.family

    from turbochain.export import load, schedule, tables

    made = schedule.tabulate_all(load.scheduler(checkpoint), request["steps"])
    K = max(table.K for table in made.values())
    return {
        "folder": str(checkpoint.folder),
        "variant": checkpoint.variant,
        "vae": checkpoint.vae and str(checkpoint.vae),
        "commit": commit,
        "family": family.name,
        "pipeline_class": family.pipeline_class,
        "license": checkpoint.license(),
        "weights": {
            f"{component}/{path.name}": dataclasses.asdict(describe(path))
            for component, paths in checkpoint.weights.items()
            for path in paths
        },
        "components": list(family.components),
        "chain": strict_json.plain(common.text_to_image(family, replace(shape, K=K), tables.entries(made))),
        "tokenizers": {k: strict_json.plain(v) for k, v in tables.tokenizers(checkpoint, root).items()},
        "terms": [*_copy_terms(checkpoint.folder, root), *_copy_terms(checkpoint.vae, root, "vae-")],
    }


def reference(
    progress: Progress, *, request: dict[str, Any], prepared: dict[str, Any], folder: str
) -> dict[str, dict[str, Any]]:
    """Run diffusers' own pipeline and record it in `folder`; returns graph → `Remedy`, as a dict."""
    from turbochain.export import load, schedule, tables
    from turbochain.export import reference as recorder
    from turbochain.runtime.bundle.manifest import REFERENCE

    shape = Shape(request["height"], request["width"], request["batch"])
    checkpoint, path = _checkpoint(prepared), Path(folder, REFERENCE)
    family = checkpoint.family
    pipeline = load.pipeline(checkpoint)
    made = schedule.tabulate_all(load.scheduler(checkpoint), request["steps"])
    tables.write(made, family, pipeline.unet, shape, Path(folder, prepared["chain"]["tables_file"]))
    recorder.record(pipeline, checkpoint, shape, request["steps"], path, progress)
    asked = common.precisions(family, request["precision"], request.get("vae_precision"))
    decided = decide(common.graphs(family, prepared["chain"]["K"]), asked, path)
    return {name: dataclasses.asdict(remedy) for name, remedy in decided.items()}


def graphs(
    progress: Progress,
    *,
    request: dict[str, Any],
    prepared: dict[str, Any],
    folder: str,
    component: str,
    remedies: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Trace every stage of one component into `folder`; returns their entries in the manifest."""
    from turbochain.export import tables
    from turbochain.export.tracing import trace

    shape = Shape(request["height"], request["width"], request["batch"], prepared["chain"]["K"])
    columns = tables.columns(Path(folder, prepared["chain"]["tables_file"]))
    decided = {name: Remedy(**remedy) for name, remedy in remedies.items()}
    made = trace.export(_checkpoint(prepared), component, shape, decided, columns, Path(folder), request["opset"])
    return {name: strict_json.plain(graph) for name, graph in made.items()}


def _open(
    name: str, vae: str | None, request: dict[str, Any], root: Path, progress: Progress, check_room: CheckRoom
) -> tuple[Checkpoint, str | None]:
    """The checkpoint on disk and its commit; `check_room` is called before anything large is fetched or drawn."""
    variant = request["variant"]
    if name.startswith(SYNTHETIC):
        folder = root / "checkpoint"
        drawn = _draw(name.removeprefix(SYNTHETIC), folder, vae == other_vae.TINY, progress, check_room)
        return open_folder(folder, None, drawn or other_vae.find(folder, vae)), None
    if local(name).exists():
        if not local(name).is_dir():
            raise InputError(
                f"{name} is a file; a folder in diffusers' format was expected: load the file with diffusers' "
                "from_single_file(...) and call save_pretrained(FOLDER)"
            )
        folder = local(name).resolve()
        checkpoint, commit = open_folder(folder, variant, other_vae.find(folder, vae)), None
    elif is_hub_id(name):

        def before_weights(folder: Path, counts: dict[str, int], fetched: int) -> None:
            coming = Checkpoint(folder, variant, other_vae.find(folder, vae))
            check_configs(coming)
            if missing := [c for c in coming.family.components if c not in counts]:
                raise InputError(f"{name} has no safetensors weights of {', '.join(missing)}")
            check_room(coming.family, coming.configs, counts, fetched)

        folder, commit = hub.fetch(name, request["revision"], variant, progress, before_weights)
        checkpoint = open_folder(folder, variant, other_vae.find(folder, vae))
    else:
        raise InputError(f"{name} is {KINDS}")
    counts = {c: checkpoint.parameters(c) for c in checkpoint.family.components}
    check_room(checkpoint.family, checkpoint.configs, counts, 0)
    return checkpoint, commit


def _draw(preset: str, folder: Path, tiny: bool, progress: Progress, check_room: CheckRoom) -> Path | None:
    """Write a synthetic checkpoint and, where it is wanted, a tiny VAE for it; returns that one's folder."""
    from turbochain.export.sources import synthetic

    parts = synthetic.models(preset)
    counts = {c: sum(p.numel() for p in part.parameters()) for c, part in parts.items()}
    configs = {
        c: part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config) for c, part in parts.items()
    }
    drawn = synthetic.PRESETS[preset]
    check_room(families.of(drawn.pipeline), configs, counts, sum(counts.values()) * (2 if drawn.fp16 else 4))
    synthetic.write_checkpoint(preset, folder, progress=progress)
    if not tiny:
        return None
    synthetic.write_tiny_vae(preset, folder / other_vae.TINY)
    return folder / other_vae.TINY


def _checkpoint(prepared: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path(prepared["folder"]), prepared["variant"], prepared["vae"] and Path(prepared["vae"]))


def _copy_terms(model: Path | None, root: Path, prefix: str = "") -> list[str]:
    found = sorted({p for pattern in TERMS for p in model.glob(pattern) if p.is_file()}) if model else []
    for path in found:
        shutil.copyfile(path, root / (prefix + path.name))
    return [prefix + path.name for path in found]
