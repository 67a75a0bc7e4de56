"""Trace a miniature's graphs of image-to-image, inpainting and guidance, and compute the same with diffusers."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import torch
from PIL import Image

from turbochain.export.chains import Placed
from turbochain.export.families import GraphSpec, Shape, common
from turbochain.export.remedies import Remedy
from turbochain.export.sources.checkpoint import Checkpoint, Part, open_folder
from turbochain.export.tracing import trace
from turbochain.export.tracing.trace import Columns, TraceOrder
from turbochain.runtime.bundle.manifest import Graph

ENCODERS = {"sd": "VaeEncoder", "sdxl": "SDXLVaeEncoder"}
IMAGE_TO_IMAGE = {"sd": "StableDiffusionImg2ImgPipeline", "sdxl": "StableDiffusionXLImg2ImgPipeline"}
INPAINTING = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
SQUARE, WIDE = Shape(64, 64, 1), Shape(72, 88, 2)


def checkpoint(folder: Path, vae: Path | None = None) -> Checkpoint:
    """A checkpoint, if asked with the VAE in another folder in place of its own."""
    opened = open_folder(folder, None)
    return dataclasses.replace(opened, replaced={"vae": Part(vae, vae, vae.name)}) if vae else opened


def tiny_vae(folder: Path) -> Path:
    """Write an AutoencoderTiny with random weights."""
    torch.manual_seed(0)
    channels = {f"{part}_block_out_channels": (16,) * 4 for part in ("encoder", "decoder")}
    diffusers.AutoencoderTiny(**channels, scaling_factor=0.5).save_pretrained(folder)
    return folder


def encoder(checkpoint: Checkpoint) -> GraphSpec:
    return own(checkpoint, "vae_encoder")["vae_encoder"]


def arithmetic(K: int = 1) -> dict[str, GraphSpec]:
    return {"start": common.start(), "blend": common.blend(), "step+guidance": common.guided_step(K)}


def own(checkpoint: Checkpoint, name: str, K: int = 1) -> dict[str, GraphSpec]:
    """The specification of a graph of this name."""
    posterior = checkpoint.index["vae"][1] != "AutoencoderTiny"
    return {name: common.graphs(checkpoint.family, K, posterior)[name]}


def traced(
    checkpoint: Checkpoint,
    specs: Mapping[str, GraphSpec],
    shape: Shape,
    folder: Path,
    remedy: Remedy | None = None,
    columns: Columns = MappingProxyType({}),
) -> dict[str, Graph]:
    """The graphs, all of one component, in `folder`."""
    (component,) = {spec.component for spec in specs.values()}
    wanted = [TraceOrder(name, Placed(spec, shape), remedy or Remedy("fp32")) for name, spec in specs.items()]
    return trace.export_graphs(checkpoint, component, wanted, columns, folder)


def run(folder: Path, graph: Graph, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes on the CPU; `feeds` are arrays or tensors."""
    session = onnxruntime.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
    names = [t.name for t in graph.outputs]
    return dict(zip(names, session.run(names, {n: np.asarray(v) for n, v in feeds.items()}), strict=True))


def pictures(shape: Shape) -> np.ndarray:
    """Pictures [B, H, W, 3] uint8 with smooth areas, noise, black and white."""
    random = np.random.default_rng(shape.batch)
    slope = np.linspace(0, 255, shape.height * shape.width * 3).reshape(1, shape.height, shape.width, 3)
    made = np.repeat(slope, shape.batch, 0) + random.normal(0, 40, (shape.batch, shape.height, shape.width, 3))
    return np.clip(made, 0, 255).astype(np.uint8)


def pils(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def pipelines(checkpoint: Path, family: str) -> tuple[Any, Any]:
    """diffusers' own pipelines for image-to-image and inpainting, of the same parts."""
    options = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
    first = getattr(diffusers, IMAGE_TO_IMAGE[family]).from_pretrained(checkpoint, local_files_only=True, **options)
    second = getattr(diffusers, INPAINTING[family])(**first.components | options)
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    return first, second


@contextmanager
def spied(owner: Any, method: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Yield the arguments and the result of each call of a method, as the calls come."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = getattr(owner, method)

    @functools.wraps(original)  # diffusers reads the parameters of some
    def watched(*arguments: Any, **more: Any) -> Any:
        kept = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        result = original(*arguments, **more)
        calls.append((kept, result))
        return result

    setattr(owner, method, watched)
    try:
        yield calls
    finally:
        delattr(owner, method)
