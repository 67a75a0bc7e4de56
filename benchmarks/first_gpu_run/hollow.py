"""Bundles without weights: what the runtime reads of one when its stages are PyTorch's own modules."""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from turbochain.export import tables
from turbochain.export.chains import Layout
from turbochain.export.families import Shape
from turbochain.export.requested import Requested
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.manifest import (
    FORMAT_VERSION,
    REFERENCE,
    TEXT_TO_IMAGE,
    Graph,
    Manifest,
    Origin,
    Tensor,
)


def of_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Write into `folder` a bundle's copy with its tokenizers, tables and reference, and with empty graphs."""
    manifest = bundle.manifest
    kept = [*(t.file for t in manifest.tokenizers.values()), *(c.tables_file for c in manifest.chains.values())]
    for file in (*kept, REFERENCE):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, folder / file)
    return _sealed(manifest, folder)


def of_models(checkpoint: Path, parts: Mapping[str, torch.nn.Module], shape: Shape, folder: Path) -> Bundle:
    """Write into `folder` the bundle that an export of these models would make for text-to-image in 1 to 4 steps, with
    empty graphs.

    `checkpoint`: all of a checkpoint but its weights. `parts`: component → model, in fp32. It has no reference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given, size = Checkpoint(checkpoint), (shape.width, shape.height)
    requested = Requested(checkpoint.name, {}, "fp32", tasks=(TEXT_TO_IMAGE,), sizes=(size,), batches=(shape.batch,))
    family, made = given.family, tables.make(given, requested)
    layout = tables.layout(given, requested, made)
    ((name, chain),) = tables.chains(given, requested, layout, made).items()
    unet = _reading_time(parts["unet"])
    tables.write(made[TEXT_TO_IMAGE], family, unet, layout.shapes[0], folder / chain.tables_file)
    return _sealed(
        Manifest(
            format_version=FORMAT_VERSION,
            family=family.name,
            checkpoint=Origin(checkpoint.name, family.pipeline_class, {}),
            request={},
            created="",
            created_by={},
            requires={},
            tokenizers=tables.tokenizers(given, layout.tokenizers(), folder),
            graphs=dict(_graphs(layout, tables.columns(folder / chain.tables_file))),
            chains={name: chain},
            files={},
        ),
        folder,
    )


def _graphs(layout: Layout, columns: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Graph]]:
    """Yield the graphs of a chain. Wiring is name equality: an output is what reads it, and the picture is known."""
    ((shape,), graphs) = layout.shapes, layout.graphs()
    inputs = {
        name: tuple(
            Tensor(k, *(v or ("float32", columns[k])))
            for k, v in graph.spec.inputs(layout.configs, graph.shape).items()
        )
        for name, graph in graphs.items()
    }
    read = {t.name: t for of in inputs.values() for t in of}
    read["image"] = Tensor("image", "uint8", (shape.batch, shape.height, shape.width, 3))
    for name, like in (("guided_prediction", "prediction"), ("next_history", "history")):
        if like in read:
            read[name] = replace(read[like], name=name)
    for name, graph in graphs.items():
        spec = graph.spec
        yield (
            name,
            Graph(
                role=spec.role,
                component=spec.component,
                file="",
                data=(),
                names="",
                precision=spec.precision or "fp32",
                opset=21,
                inputs=inputs[name],
                outputs=tuple(read[output] for output in spec.outputs),
                size=(shape.height, shape.width) if spec.sized else (),
                batch=shape.batch,
            ),
        )


def _reading_time(unet: Any) -> Any:
    """Return a UNet on the CPU that has only what reads the time: the rest takes no memory."""
    with torch.device("meta"):
        alone = type(unet).from_config(unet.config)
    own = {k: v.detach().cpu().float() for k, v in unet.state_dict().items() if re.search("time_emb|add_emb", k)}
    alone.load_state_dict(own, strict=False, assign=True)
    return alone


_NOTHING = b"\x08\x08\x12\x00:\x00"
"""An ONNX model with a graph of no nodes."""


def _sealed(manifest: Manifest, folder: Path) -> Bundle:
    """Write the manifest, with graphs of nothing, and open the bundle."""
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = replace(graph, file=f"graphs/{name}.onnx", data=(), names=f"graphs/{name}.names.json")
        for file in (graphs[name].file, graphs[name].names):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(_NOTHING)
    (folder / REFERENCE).touch()
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "bundle.json")
    records = {file: hashing.describe(folder / file) for file in files}
    (folder / "bundle.json").write_text(strict_json.write(replace(manifest, graphs=graphs, files=records)))
    return Bundle.open(folder)
