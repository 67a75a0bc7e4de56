"""The export as three jobs, each run in a process of its own; arguments and results travel as JSON."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbochain.export import estimate
from turbochain.export.controls import controlnet
from turbochain.export.families import Family
from turbochain.export.order import ExportOrder
from turbochain.export.prepared import Prepared
from turbochain.export.remedies import Remedy, decide
from turbochain.export.requested import Requested
from turbochain.export.sources import Want, adapters, find, parts
from turbochain.export.sources.checkpoint import Checkpoint, Part
from turbochain.export.sources.digests import Digests
from turbochain.runtime.bundle.manifest import REFERENCE, Graph, Origin, PartOrigin

Progress = Callable[[int, int], None]


def prepare(progress: Progress, *, order: ExportOrder, requested: Requested, folder: Path, force: bool) -> Prepared:
    """Bring the checkpoint onto this disk, and write into `folder` all of it that needs no tracing.

    Returns what the later jobs and the manifest need. What can be refused without loading weights is refused
    here, before the long work: first what needs no torch, then too little memory or disk (unless `force`).
    """

    def check_room(family: Family, configs: Mapping[str, Any], counts: Mapping[str, int], fetched: int) -> None:
        layout = requested.layout(family, configs)
        precisions = layout.precisions(requested.precision, requested.vae_precision)
        estimate.require(estimate.needs(layout.graphs(), configs, counts, precisions, fetched), folder, force)

    if name := (order.scheduler or {}).get("_class_name"):
        from turbochain.export import load

        load.scheduler_class(name)  # refused before anything is downloaded
    want = Want(folder, revision=order.revision, variant=order.variant, config=order.config, progress=progress)
    checkpoint = fetch(order, want, check_room)

    from turbochain.export import tables

    made = tables.make(checkpoint, requested)
    layout = tables.layout(checkpoint, requested, made)
    return Prepared(
        checkpoint=checkpoint,
        origin=_origin(checkpoint, folder),
        zeros=layout.zeros,
        chains=tables.chains(checkpoint, requested, layout, made),
        tokenizers=tables.tokenizers(checkpoint, layout.tokenizers(), folder),
    )


def reference(progress: Progress, *, requested: Requested, prepared: Prepared, folder: Path) -> dict[str, Remedy]:
    """Run diffusers' own pipelines, and write the tables and what they produced into `folder`; return graph →
    remedy."""
    import torch

    from turbochain.export import load, tables
    from turbochain.export import reference as recorder

    checkpoint, path, layout = prepared.checkpoint, folder / REFERENCE, prepared.layout(requested)
    of_diffusers = load.pipelines(checkpoint, list(dict.fromkeys(task.pipeline for task in layout.tasks)))
    pipelines = {task.name: of_diffusers[task.pipeline] for task in layout.tasks}
    nets = {one: load.component(checkpoint, one.component, torch.float32) for one in layout.controls}
    controlled = load.controlled(checkpoint, nets, of_diffusers)
    made, unet = tables.make(checkpoint, requested), next(iter(pipelines.values())).unet
    files = {prepared.chains[layout.name(task, shape)].tables_file: (task, shape) for task, shape in layout.chains}
    for file, (task, shape) in files.items():
        own = {one: nets[one] for one in layout.steered.of(task.name) if one.kind is controlnet.KIND}
        tables.write(made[task.name], checkpoint.family, unet, shape, folder / file, own)
    of_diffusers_call = load.defaults(checkpoint, layout.tasks[0].pipeline)
    scale = max(requested.guidance_scale or 0.0, of_diffusers_call.guidance_scale)  # of the guided calls: one above 1
    lower = _lower_precisions(requested)
    sources = recorder.Sources(pipelines, controlled, nets)
    recorder.write(sources, checkpoint, layout, prepared.chains, scale, requested.call, lower, path, progress)
    return decide(layout.graphs(), layout.precisions(requested.precision, requested.vae_precision), path)


def graphs(
    progress: Progress,
    *,
    requested: Requested,
    prepared: Prepared,
    folder: Path,
    component: str,
    remedies: dict[str, Remedy],
) -> dict[str, Graph]:
    """Trace every graph of one component into `folder`; return their entries in the manifest."""
    from turbochain.export import tables
    from turbochain.export.tracing import trace

    columns = tables.columns(*(folder / chain.tables_file for chain in prepared.chains.values()))
    placed = prepared.layout(requested).graphs()
    wanted = [
        trace.TraceOrder(name, graph, remedies[name])
        for name, graph in placed.items()
        if graph.spec.component == component
    ]
    return trace.export_graphs(prepared.checkpoint, component, wanted, columns, folder, requested.opset)


def fetch(order: ExportOrder, want: Want, check_room: parts.CheckRoom | None = None) -> Checkpoint:
    """Bring the order's checkpoint onto this disk, and the parts from elsewhere; the LoRAs, which are small, first.

    Raises InputError as `parts.fetch`, and if a LoRA does not fit.
    """
    if order.loras or order.references:
        adapters.require_peft()
    loras = parts.fetch_loras(want, {key: name for key, (name, _) in order.loras.items()})
    fused = tuple((loras[key].weights[0], scale) for key, (_, scale) in order.loras.items())
    checkpoint = parts.fetch(find(order.source), want, order.parts, check_room, order.controls)
    checkpoint = replace(checkpoint, loras=loras, adapters=fused, scheduler=order.scheduler or {})
    checkpoint = replace(checkpoint, references=tuple(order.references))
    named = {key: source.local or loras[key].weights[0] for key, source in order.sources.items() if key in loras}
    adapters.read_all(replace(checkpoint, adapters=tuple((path, 1.0) for path in named.values())))  # whether they fit
    adapters.read_references(checkpoint)
    return checkpoint


def _lower_precisions(requested: Requested) -> list[str]:
    """Return what the graphs may be computed in besides fp32, the more precise first; fp32 graphs may run in bf16."""
    wanted = {"bf16" if requested.precision == "fp32" else requested.precision, requested.vae_precision}
    return [precision for precision in ("fp16", "bf16") if precision in wanted]


def _origin(checkpoint: Checkpoint, folder: Path) -> Origin:
    """Return where the checkpoint came from, its licences copied into `folder`."""
    weighty, known = {*checkpoint.components, *checkpoint.loras}, Digests(folder)
    foreign = checkpoint.replaced | checkpoint.loras | checkpoint.controls
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
