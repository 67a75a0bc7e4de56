"""The options of `turbochain.export.export` and `turbochain.engines.build` that say what bundle is made."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class ExportOptions(TypedDict, total=False):
    """What `export` and `build` take to say what bundle is made; None, or left out: the default."""

    precision: str | None
    """"fp32" (the default on a CPU) or "fp16"; a graph that would overflow fp16 gets a remedy."""
    vae_precision: str | None
    """"fp32" or "bf16", for the VAE instead."""
    tasks: Sequence[str] | None
    """Of text-to-image, image-to-image (the default are both), inpainting and stream (image-to-image of a camera)."""
    size: tuple[int, int] | Sequence[tuple[int, int]] | None
    """Width and height in pixels, multiples of 8 (default 512×512), or several: there is a chain of each."""
    batch: int | Sequence[int] | None
    """Pictures per pass (default 1), or several: there is a chain of each."""
    steps: Sequence[int] | None
    """Step counts, 1 to 50 (default 1 to 4)."""
    guidance_scale: float | None
    """Of a call that gives none (default 0, for models that were trained to do without; 7.5 is usual for SD 1.5)."""
    guidance_scales: Sequence[float] | None
    """Those that calls can choose from if the UNet reads the scale itself (default: that of the pipeline)."""
    clip_skip: int | None
    """How many of the text encoders' last layers a prompt is drawn without (default 0), as diffusers' argument."""
    strengths: Sequence[float] | None
    """Those that calls of LatentConsistencyModelImg2ImgPipeline can choose from (default: that of the pipeline)."""
    stream_batch: int | None
    """How many frames are under way in a stream, 2 (the default) to 4: each makes as many steps, one in each launch."""
    opset: int | None
    """Of the ONNX graphs, 18 to 23 (default 21)."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    variant: str | None
    """Of the weight files, such as "fp16"."""
    config: str | None
    """Of a source that is a .safetensors file in the original names (ldm, sgm): the configuration that it was published
    with, "sd15", "sd21" (768×768), "sd21-base" (512×512), "sd-turbo", "sdxl", "sdxl-turbo", or a folder with its JSON
    files in diffusers' format. Default: what the shapes of its tensors tell, said on stderr."""
    vae: str | None
    """Another VAE than the checkpoint's own: "tiny" (the family's AutoencoderTiny, many times faster, pictures slightly
    softer), a .safetensors file, a hub id or a folder."""
    unet: str | None
    """Another UNet: a .safetensors file, a hub id, a file of a hub repository (owner/name/file) or a folder; if it has
    no config, the checkpoint's serves."""
    lora: Sequence[str] | None
    """LoRAs that are fused, in this order, each NAME or NAME:SCALE, named as a UNet is."""
    lora_rank: int | Sequence[int] | None
    """Give the graphs slots for LoRAs that `Pipeline.load_lora_weights` changes between two pictures: the largest sum
    of the ranks of those that are loaded together, 1 to 256, or several: a call runs the least that holds them."""
    reference_lora: Sequence[str] | None
    """LoRA files, each FILE or FILE:SCALE, whose pictures by diffusers are recorded for `turbochain verify --lora`."""
    scheduler: str | Mapping[str, Any] | None
    """The name of another class, or changes of its config, in which `_class_name` names a class; it is made as
    `CLASS.from_config(pipe.scheduler.config, …)` makes it."""
    timesteps: Sequence[int] | None
    """Explicit ones instead of `steps`, descending."""
    eta: float | None
    """Of schedulers that have one, 0 to 1 (default 0)."""
    recipe: str | None
    """One of `turbochain.export.recipes`, which gives the source and all of these that are not given."""
