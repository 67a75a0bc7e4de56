"""The peers as drawers: diffusers (eager, compiled) and Hugging Face's optimum. Runs in a peer's own environment.

A drawer has `draw(prompts, seed, steps)` → pictures [B, H, W, 3] uint8 in host memory, `stages` (graph → seconds of its
launches in the last call), `gpu_seconds()` of the last call, `remark()`, and `precision` (role → what it computes in).
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pipe:
    """A pipeline with diffusers' interface that returns PIL images."""

    stages: dict[str, list[float]]
    precision: dict[str, str]

    def __init__(self, pipe: Any, spec: dict[str, Any]) -> None:
        self.pipe, self.spec, self.stages, self.precision = pipe, spec, {}, {}
        pipe.set_progress_bar_config(disable=True)

    def draw(self, prompts: list[str], seed: int, steps: int) -> Any:
        """Return pictures [B, H, W, 3] uint8."""
        import numpy

        return numpy.stack([numpy.asarray(image) for image in self.call(prompts, seed, steps)])

    def call(self, prompts: list[str], seed: int, steps: int, **more: Any) -> Any:
        """Return the pipeline's images."""
        import torch

        width, height = self.spec["size"]
        return self.pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(seed),
            height=height,
            width=width,
            **more,
        ).images

    def gpu_seconds(self) -> float | None:
        """Return None: not measured."""
        return None

    def remark(self) -> str | None:
        """Return None: nothing."""
        return None


class Eager(Pipe):
    """diffusers' own pipeline; its pictures become uint8 on the device, so that less is downloaded."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        torch.set_grad_enabled(False)
        torch.backends.cudnn.allow_tf32 = spec["precision"] != "fp32"
        diffusers = importlib.import_module("diffusers")
        diffusers.utils.logging.set_verbosity_error()  # at each call it would say that SDXL's VAE moves to fp32
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[spec["precision"]]
        kind = diffusers.AutoPipelineForText2Image
        pipe = kind.from_pretrained(spec["source"], torch_dtype=dtype, variant=spec["variant"]).to(spec["device"])
        super().__init__(pipe, spec)
        # Only the SDXL pipelines heed that entry of the VAE's config.
        upcast = pipe.vae.config.get("force_upcast") and "XL" in type(pipe).__name__
        self.upcast = dtype == torch.float16 and bool(upcast)
        encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None)]
        self.precision = dict.fromkeys([*encoders, "unet", "vae_decoder"], spec["precision"])
        if self.upcast:
            self.precision["vae_decoder"] = "fp32"
        if spec["channels_last"]:
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        gpu = torch.device(spec["device"]).type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if gpu else []

    def draw(self, prompts: list[str], seed: int, steps: int) -> Any:
        """See Pipe."""
        import torch

        if self.events:
            self.events[0].record()
        images = self.call(prompts, seed, steps, output_type="pt")
        levels = (images.float() * 255).round().to(torch.uint8)
        pictures = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        if self.events:
            self.events[1].record()
        return pictures

    def gpu_seconds(self) -> float | None:
        """Return the GPU's seconds from the start of the last call, pauses between kernels included; None on a CPU."""
        if not self.events:
            return None
        self.events[1].synchronize()
        return 1e-3 * self.events[0].elapsed_time(self.events[1])


class Compiled(Eager):
    """`Eager` with torch.compile; on a GPU every network, as diffusers' guide has it (max-autotune, CUDA graphs)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import torch

        unet, vae = self.pipe.unet, self.pipe.vae
        if not self.events:
            unet.compile()
            vae.decode = torch.compile(vae.decode)
            return
        if self.upcast:
            vae.to(torch.float32)  # once: weights that move at each call would be captured again
        for name in self.precision.keys() - {"vae_decoder"}:
            module = getattr(self.pipe, name)
            module.forward = _with_cuda_graphs(module.forward)
        decode, dtype = _with_cuda_graphs(vae.decode), vae.dtype
        vae.decode = lambda latents, return_dict, generator=None: decode(latents.to(dtype), return_dict=return_dict)


def _with_cuda_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils._pytree import tree_map_only

    compiled = torch.compile(function, mode="max-autotune", dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        # The next launch of any compiled function may overwrite what this one returned.
        return tree_map_only(torch.Tensor, torch.Tensor.clone, compiled(*args, **kwargs))

    return call


def optimum_onnx(spec: dict[str, Any]) -> Pipe:
    """Load Hugging Face's optimum with ONNX Runtime."""
    return Pipe(_exported(spec, "ORTPipelineForText2Image"), spec)


def optimum_intel(spec: dict[str, Any]) -> Pipe:
    """Load Hugging Face's optimum with OpenVINO."""
    pipe = _exported(spec, "OVPipelineForText2Image", compile=False, ov_config=spec["options"])
    width, height = spec["size"]
    # With a fixed batch it expects twice as many, for guidance, and then refuses Turbo's calls: it stays dynamic.
    pipe.reshape(batch_size=-1, height=height, width=width, num_images_per_prompt=1)
    pipe.compile()
    return Pipe(pipe, spec)


def _exported(spec: dict[str, Any], name: str, **options: Any) -> Any:
    """Load optimum's export of a checkpoint, which the first load writes beside it."""
    kind = getattr(importlib.import_module(spec["kind"]), name)
    exported = Path(f"{spec['source']}-{spec['kind']}")
    if not exported.exists():
        kind.from_pretrained(spec["source"], export=True).save_pretrained(exported)
    return kind.from_pretrained(exported, **options)


KINDS: dict[str, Callable[[dict[str, Any]], Pipe]] = {
    "eager": Eager,
    "compiled": Compiled,
    "optimum.onnxruntime": optimum_onnx,
    "optimum.intel": optimum_intel,
}
"""Contender.kind → what loads it."""
