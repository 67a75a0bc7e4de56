"""The export as three jobs, each run in a process of its own; arguments and results travel as JSON."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbochain.export import estimate
from turbochain.export.families import Family, common
from turbochain.export.order import ExportOrder, Recipe
from turbochain.export.prepared import Prepared
from turbochain.export.remedies import Remedy, decide
from turbochain.export.sources import Want, adapters, find, parts
from turbochain.export.sources.checkpoint import Checkpoint, Part
from turbochain.export.sources.digests import Digests
from turbochain.runtime.bundle.manifest import REFERENCE, Graph, Origin, PartOrigin
from turbochain.runtime.chain.tables import Table

Progress = Callable[[int, int], None]


def prepare(progress: Progress, *, order: ExportOrder, recipe: Recipe, folder: Path, force: bool) -> Prepared:
    """Get the checkpoint onto this disk, and write into `folder` everything of it that needs no tracing.

    Returns what the later jobs and the manifest need. What can be refused without loading weights is refused
    here, before the long work: first what needs no torch, then too little memory or disk (unless `force`).
    """

    def check_room(family: Family, configs: Mapping[str, Any], counts: Mapping[str, int], fetched: int) -> None:
        needs = estimate.needs(family, configs, counts, recipe.shape, recipe.precisions(family), fetched)
        estimate.require(needs, folder, force)

    if name := (order.scheduler or {}).get("_class_name"):
        from turbochain.export import load

        load.scheduler_class(name)  # refused before anything is downloaded
    want = Want(folder, revision=order.revision, variant=order.variant, config=order.config, progress=progress)
    checkpoint = fetch(order, want, check_room)

    from turbochain.export import tables

    made = _tabulate(checkpoint, recipe)
    shape = replace(recipe.shape, K=max(table.K for table in made.values()))
    return Prepared(
        checkpoint=checkpoint,
        origin=_origin(checkpoint, folder),
        chain=common.text_to_image(checkpoint.family, shape, tables.entries(made)),
        tokenizers=tables.tokenizers(checkpoint, folder),
    )


def reference(progress: Progress, *, recipe: Recipe, prepared: Prepared, folder: Path) -> dict[str, Remedy]:
    """Run diffusers' own pipeline, and write the tables and what it produced into `folder`; return graph → remedy."""
    from turbochain.export import load, tables
    from turbochain.export import reference as recorder

    checkpoint, path = prepared.checkpoint, folder / REFERENCE
    family, pipeline, steps = checkpoint.family, load.pipeline(checkpoint), list(recipe.steps)
    made = _tabulate(checkpoint, recipe)
    tables.write(made, family, pipeline.unet, recipe.shape, folder / prepared.chain.tables_file)
    recorder.write(pipeline, checkpoint, recipe.shape, steps, path, progress, recipe.call)
    return decide(common.graphs(family, prepared.chain.K), recipe.precisions(family), path)


def graphs(
    progress: Progress,
    *,
    recipe: Recipe,
    prepared: Prepared,
    folder: Path,
    component: str,
    remedies: dict[str, Remedy],
) -> dict[str, Graph]:
    """Trace every graph of one component into `folder`; return their entries in the manifest."""
    from turbochain.export import tables
    from turbochain.export.tracing import trace

    shape = replace(recipe.shape, K=prepared.chain.K)
    columns = tables.columns(folder / prepared.chain.tables_file)
    return trace.export(prepared.checkpoint, component, shape, remedies, columns, folder, recipe.opset)


def fetch(order: ExportOrder, want: Want, check_room: parts.CheckRoom | None = None) -> Checkpoint:
    """Bring the order's checkpoint onto this disk, and the parts from elsewhere; the LoRAs, which are small, first.

    Raises InputError as `parts.fetch`, and if a LoRA does not fit.
    """
    if order.loras:
        adapters.require_peft()
    loras = parts.fetch_loras(want, {key: name for key, (name, _) in order.loras.items()})
    fused = tuple((loras[key].weights[0], scale) for key, (_, scale) in order.loras.items())
    checkpoint = parts.fetch(find(order.source), want, order.parts, check_room)
    checkpoint = replace(checkpoint, loras=loras, adapters=fused, scheduler=order.scheduler or {})
    adapters.read_all(checkpoint)  # whether they fit
    return checkpoint


def _tabulate(checkpoint: Checkpoint, recipe: Recipe) -> dict[int, Table]:
    """Return steps → table of text-to-image."""
    from turbochain.export import load, schedule

    made = schedule.tabulate_all(load.scheduler(checkpoint), recipe.runs)
    return {run.steps: table for run, table in made.items()}


def _origin(checkpoint: Checkpoint, folder: Path) -> Origin:
    """Return where the checkpoint came from, its licences copied into `folder`."""
    weighty, known = {*checkpoint.family.components, *checkpoint.loras}, Digests(folder)
    foreign = checkpoint.replaced | checkpoint.loras
    return Origin(
        source=checkpoint.source,
        pipeline_class=checkpoint.family.pipeline_class,
        parts={
            name: PartOrigin(
                source=part.source,
                revision=part.revision,
                variant=part.own_variant if name in weighty else None,
                license=part.license,
                terms=_copy_terms(part, folder, f"{name}-" if name in foreign else ""),
                weights={path.name: known.record(path) for path in part.weights} if name in weighty else {},
            )
            for name, part in checkpoint.parts.items()
        },
    )


def _copy_terms(part: Part, folder: Path, prefix: str) -> tuple[str, ...]:
    for path in part.terms:
        shutil.copyfile(path, folder / (prefix + path.name))
    return tuple(prefix + path.name for path in part.terms)
