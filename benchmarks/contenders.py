"""The ways of making a picture that `make bench-gpu` compares.

A pipeline is loaded once; a contender is one way of using one. PyTorch's import is the caller's affair.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.utils import logging
from torch.utils._pytree import tree_map_only

from turbochain.engines import build
from turbochain.export import load
from turbochain.export.sources import Want, find, parts
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import Pipeline
from turbochain.runtime.commands.bench import PROMPT

SEED = 0
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Task:
    """What every contender is asked for: `batch` pictures of one prompt and seed."""

    checkpoint: Checkpoint
    name: str  # of the checkpoint, for its bundles' names
    folder: Path  # where bundles are kept
    device: str
    size: tuple[int, int]  # width, height
    batch: int
    steps: tuple[int, ...]
    precision: str  # of our bundles

    @property
    def prompts(self) -> list[str]:
        """One for each picture."""
        return [PROMPT] * self.batch

    @property
    def bundle(self) -> Path:
        """Where the bundle is, or will be."""
        width, height = self.size
        return self.folder / f"{self.name}-{width}x{height}-b{self.batch}-{self.precision}.bundle"

    def build(self, backend: str) -> None:
        """See that the bundle is there with an engine of this backend. Raises what `engines.build` raises."""
        if (self.bundle / "bundle.json").exists():
            build(str(self.bundle), backend=backend, device=self.device)
            return
        shape = {"size": self.size, "batch": self.batch, "steps": sorted({1, 2, 4, *self.steps})}
        where = {"backend": backend, "device": self.device, "precision": self.precision}
        build(str(self.checkpoint.folder), self.bundle, **where, **shape)  # type: ignore[arg-type]


def checkpoint(source: str, folder: Path) -> Checkpoint:
    """A source's checkpoint on this disk; a synthetic one is written into `folder` once."""
    return parts.fetch(find(source), Want(folder), {})


class Loaded(Protocol):
    """A pipeline that is ready to draw."""

    precision: dict[str, str]  # role → what it computes in
    stages: dict[str, list[float]]  # graph → seconds of its launches in mode "stages", since this was cleared

    def prepare(self, mode: str) -> None:
        """What is done before a picture and is not part of its time."""

    def draw(self, steps: int) -> np.ndarray:
        """Prompt strings → pictures [B, H, W, 3] uint8 in host memory; what is timed."""

    def gpu_seconds(self) -> float | None:
        """How long the GPU took for the last picture, by CUDA events; None on a CPU."""

    def remark(self) -> str | None:
        """What of it is not as it should be, as a phrase."""

    def close(self) -> None:
        """Give its memory back."""


class Eager:
    """diffusers' own pipeline; only the conversion to uint8 is ours, on the device, so that less is downloaded."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        logging.set_verbosity_error()  # it would say at each call that SDXL's VAE moves to fp32
        self.task, self.stages = task, {}
        self.pipe = load.pipeline(task.checkpoint, dtype).to(task.device)
        self.pipe.set_progress_bar_config(disable=True)
        # Only the SDXL pipelines heed that entry of the VAE's config.
        upcast = self.pipe.vae.config.force_upcast and "XL" in task.checkpoint.family.pipeline_class
        self.upcast = dtype == torch.float16 and upcast
        self.precision = {c: PRECISIONS[dtype] for c in task.checkpoint.family.components if c != "vae"}
        self.precision["vae_decoder"] = "fp32" if self.upcast else PRECISIONS[dtype]
        events = torch.device(task.device).type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if events else []

    def prepare(self, mode: str) -> None:
        """Nothing."""

    def draw(self, steps: int) -> np.ndarray:
        """See Loaded."""
        if self.events:
            self.events[0].record()
        width, height = self.task.size
        images = self.pipe(
            self.task.prompts,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(SEED),
            height=height,
            width=width,
            output_type="pt",
        ).images
        levels = (images.float() * 255).round().to(torch.uint8)
        picture = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if self.events:
            self.events[1].record()
        return picture

    def gpu_seconds(self) -> float | None:
        """See Loaded. The host's pauses between the kernels are part of it."""
        if not self.events:
            return None
        self.events[1].synchronize()
        return 1e-3 * self.events[0].elapsed_time(self.events[1])

    def remark(self) -> str | None:
        """Nothing."""
        return None

    def close(self) -> None:
        """See Loaded."""
        del self.pipe


class Compiled(Eager):
    """`Eager` with every network compiled as diffusers' guide has it: max-autotune, CUDA graphs, channels last."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        super().__init__(task, dtype)
        torch.compiler.reset()
        unet, vae = self.pipe.unet, self.pipe.vae
        if self.upcast:
            vae.to(torch.float32)  # once: weights that move at each call would be captured anew
        for module in (unet, vae):
            module.to(memory_format=torch.channels_last)
        for component in task.checkpoint.family.components:
            if component != "vae":
                module = getattr(self.pipe, component)
                module.forward = _compiled(module.forward)
        decode, dtype = _compiled(vae.decode), vae.dtype
        vae.decode = lambda latents, return_dict, generator=None: decode(latents.to(dtype), return_dict=return_dict)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, mode="max-autotune", dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        # The next launch of any compiled function may overwrite what this one returned.
        return tree_map_only(torch.Tensor, torch.Tensor.clone, compiled(*args, **kwargs))

    return call


class Chain:
    """Our pipeline, with an engine of one backend."""

    def __init__(self, task: Task, backend: str) -> None:
        self.task = task
        self.pipe = Pipeline.load(task.bundle, backend=backend, device=task.device)
        graphs, chain = self.pipe.bundle.manifest.graphs, self.pipe.bundle.chain
        self.precision = {graphs[g].role: graphs[g].precision for g in chain.graphs if g not in chain.once}
        self.stages: dict[str, list[float]] = defaultdict(list)

    def prepare(self, mode: str) -> None:
        """Forget the prompt, but in mode "cached"; in mode "stages" have every launch timed."""
        self.pipe.observe = self._note if mode == "stages" else None
        if mode != "cached":
            self.pipe.prompt_cache.clear()

    def _note(self, graph: str, seconds: float) -> None:
        self.stages[graph].append(seconds)

    def draw(self, steps: int) -> np.ndarray:
        """See Loaded."""
        return self.pipe(self.task.prompts, num_inference_steps=steps, seed=SEED, output_type="uint8").images

    def gpu_seconds(self) -> float | None:
        """See Loaded."""
        return None if self.pipe.device.kind == "cpu" else self.pipe.busy_seconds

    def remark(self) -> str | None:
        """Why it is not one graph."""
        return self.pipe.uncaptured and f"not one CUDA graph: {self.pipe.uncaptured}"

    def close(self) -> None:
        """See Loaded."""
        self.pipe.close()


Load = Callable[[], Loaded]


def _eager(dtype: torch.dtype, kind: type[Eager] = Eager) -> Callable[[Task], Load]:
    return lambda task: lambda: kind(task, dtype)


def _chain(backend: str) -> Callable[[Task], Load]:
    def ready(task: Task) -> Load:
        task.build(backend)
        return lambda: Chain(task, backend)

    return ready


PIPELINES: dict[str, Callable[[Task], Load]] = {
    "eager-fp32": _eager(torch.float32),
    "eager-fp16": _eager(torch.float16),
    "eager-bf16": _eager(torch.bfloat16),
    "compiled-fp16": _eager(torch.float16, Compiled),
    "onnxruntime": _chain("onnxruntime"),
    "tensorrt": _chain("tensorrt"),
}
"""Name → task → what loads it; what comes before loading (building an engine) is done at once."""


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    pipeline: str  # of PIPELINES
    what: str
    mode: str = ""  # "", "stages" or "cached"
    differs: str | None = None  # what of it is not like for like


def _ours(backend: str, title: str, how: str) -> list[Contender]:
    stages = f"{title}: the same stages launched one by one, with events around each"
    cached = f"{title}: {how}, the prompt unchanged"
    return [
        Contender(f"{backend}-stages", backend, stages, "stages"),
        Contender(backend, backend, f"{title}: {how}"),
        Contender(f"{backend}-cached", backend, cached, "cached", "the prompt is known, so no text encoder runs"),
    ]


GPU = [
    Contender("eager", "eager-fp16", "diffusers, eager, fp16"),
    Contender("compiled", "compiled-fp16", "diffusers, torch.compile(mode='max-autotune') with CUDA graphs, fp16"),
    *_ours("onnxruntime", "ONNX Runtime's CUDA provider", "one graph"),
    *_ours("tensorrt", "TensorRT", "one graph"),
]
"""The contenders on a GPU; the first is the one that the others are compared with."""

CPU = [
    Contender("eager", "eager-fp32", "diffusers, eager, fp32"),
    Contender("eager-bf16", "eager-bf16", "diffusers, eager, bf16"),
    *_ours("onnxruntime", "ONNX Runtime's CPU provider", "the chain"),
]
"""Those on a CPU, to try the harness without a GPU."""
