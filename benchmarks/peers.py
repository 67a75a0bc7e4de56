"""The peers as drawers: diffusers (eager, compiled), Hugging Face's optimum; cpu_peers.py has others.

They run in a peer's own environment.

A drawer has `draw(prompts, seed, steps)` → pictures [B, H, W, 3] uint8 in host memory, `stages` (graph → seconds of its
launches in the last call), `gpu_seconds()` of the last call, `remark()`, and `precision` (role → what it computes in).
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import arguments


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
        given = arguments(self.spec)
        size = {} if "image" in given else {"height": height, "width": width}  # diffusers draws an image's own size
        return self.pipe(
            prompts,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            **size,
            **given,
            **more,
        ).images

    def gpu_seconds(self) -> float | None:
        """Return None: not measured."""
        return None

    def remark(self) -> str | None:
        """Return None: nothing."""
        return None


class Eager(Pipe):
    """diffusers' own pipeline; its pictures become uint8 on the device, so that less is downloaded.

    "tuned": cuDNN tries its algorithms (`cudnn.benchmark`). "vae": a VAE that diffusers would run in fp32 runs in bf16,
    or in fp16 with its weights rescaled as our export does.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        torch.set_grad_enabled(False)
        torch.backends.cudnn.allow_tf32 = spec["precision"] != "fp32"
        torch.backends.cudnn.benchmark = spec["tuned"]
        diffusers = importlib.import_module("diffusers")
        diffusers.utils.logging.set_verbosity_error()  # at each call it would say that SDXL's VAE moves to fp32
        dtype = _dtype(spec["precision"])
        given = {"variant": spec["variant"]}
        image = "image" in arguments(spec)
        kind = diffusers.AutoPipelineForImage2Image if image else diffusers.AutoPipelineForText2Image
        pipe = kind.from_pretrained(spec["source"], torch_dtype=dtype, **given)
        if spec["vae"]:
            pipe.vae = self._another_vae(spec, type(pipe.vae), given)
        super().__init__(pipe.to(spec["device"]), spec)
        # Only the SDXL pipelines heed that entry of the VAE's config, and only of a VAE in fp16.
        upcast = pipe.vae.config.get("force_upcast") and "XL" in type(pipe).__name__
        self.upcast = pipe.vae.dtype == torch.float16 and bool(upcast)
        encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None)]
        decoder = "fp32" if self.upcast else {"rescaled": "fp16"}.get(spec["vae"], spec["vae"] or spec["precision"])
        self.precision = {**dict.fromkeys([*encoders, "unet"], spec["precision"]), "vae_decoder": decoder}
        if spec["channels_last"]:
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        if spec["vae"]:
            pipe.vae.decode = _casting(pipe.vae.decode, pipe.vae.dtype)
        gpu = torch.device(spec["device"]).type == "cuda"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if gpu else []

    def _another_vae(self, spec: dict[str, Any], kind: Any, given: dict[str, Any]) -> Any:
        """Return the VAE in the precision that is wanted; the weights are rescaled before they are rounded."""
        dtype = _dtype("fp32" if spec["vae"] == "rescaled" else spec["vae"])
        vae = kind.from_pretrained(spec["source"], subfolder="vae", torch_dtype=dtype, **given)
        if spec["vae"] == "rescaled":
            if spec["exponents"]:
                rescaling = importlib.import_module("turbochain.export.tracing.rescale")
                rescaling.rescale(vae, spec["exponents"])
            vae.to(_dtype("fp16")).register_to_config(force_upcast=False)
        return vae

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


INDUCTOR = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}
"""Inductor's settings in diffusers' guide "Accelerate inference of text-to-image diffusion models"."""


class Compiled(Eager):
    """`Eager` with torch.compile; on a GPU every network, as diffusers' guide has it (max-autotune, CUDA graphs).

    "tuned": with the guide's settings of Inductor, and Q, K and V as one product.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import torch

        unet, vae = self.pipe.unet, self.pipe.vae
        if spec["tuned"]:
            for name, value in INDUCTOR.items():
                setattr(importlib.import_module("torch._inductor.config"), name, value)
            self.pipe.fuse_qkv_projections(vae=hasattr(vae, "fuse_qkv_projections"))
        if not self.events:
            unet.compile()
            vae.decode = torch.compile(vae.decode)
            return
        if self.upcast:
            vae.to(torch.float32)  # once: weights that move at each call would be captured again
        for name in self.precision.keys() - {"vae_decoder"}:
            module = getattr(self.pipe, name)
            module.forward = _with_cuda_graphs(module.forward)
        vae.decode = _casting(_with_cuda_graphs(vae.decode), vae.dtype)


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _casting(decode: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """Return a VAE's `decode` that takes latents of any precision."""
    return lambda latents, return_dict, generator=None: decode(latents.to(dtype), return_dict=return_dict)


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
    return kind.from_pretrained(export(spec, kind), **options)


def export(spec: dict[str, Any], kind: Any) -> Path:
    """Return the folder of an export by a pipeline class of optimum, which is written if it is not there."""
    kinds = "fastsd" if spec["kind"] == "fastsd" else kind.__module__.split(".")[1]
    exported = Path(f"{spec['source']}-{kinds}")
    if not exported.exists():
        # Above a billion parameters optimum's OpenVINO would store the weights in int8.
        more = {"load_in_8bit": False} if spec["kind"] != "optimum.onnxruntime" else {}
        kind.from_pretrained(spec.get("from", spec["source"]), export=True, **more).save_pretrained(exported)
    return exported


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "eager": Eager,
    "compiled": Compiled,
    "optimum.onnxruntime": optimum_onnx,
    "optimum.intel": optimum_intel,
}
"""Contender.kind → what loads it."""
