"""Complete Turbo checkpoints with random weights, for machines that reach no model hub.

The architectures, configs and file names are the published ones; only the weights are drawn, from a seed,
with gains that keep every activation in half precision's range and make the picture depend on every input.
The `-mini` presets have the same parts at narrow widths and each kind of the UNet's blocks once, small enough for tests.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from turbochain.export.sources.vocabulary import END, MAX_TOKENS, VOCABULARY_SIZE, write_tokenizer
from turbochain.runtime.errors import InputError

Config = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """What tells one synthetic checkpoint from another: the diffusers and transformers configs of its parts.

    `text` and `pads` (the padding tokens) have one entry per text encoder; the second one projects.
    `fp16` stores the weights as float16, in the file names of diffusers' "fp16" variant.
    """

    pipeline: str
    scheduler: str
    unet: Config
    vae: Config
    tiny: Config
    text: tuple[Config, ...]
    pads: tuple[str, ...]
    fp16: bool = False
    extra: Config = field(default_factory=dict)


def _text(width: int, layers: int, heads: int, act: str, projection: int) -> Config:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act}


_SD_TURBO = Preset(
    pipeline="StableDiffusionPipeline",
    scheduler="EulerDiscreteScheduler",
    unet={"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
    vae={"sample_size": 768, "scaling_factor": 0.18215},
    tiny={},  # TAESD's are diffusers' defaults
    text=(_text(1024, 23, 16, "gelu", 512),),
    pads=("!",),
    extra={
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
)
_SDXL_TURBO = Preset(
    pipeline="StableDiffusionXLPipeline",
    scheduler="EulerAncestralDiscreteScheduler",
    unet={
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 768 + 1280,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
    vae={"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    tiny={},
    text=(_text(768, 12, 12, "quick_gelu", 768), _text(1280, 32, 20, "gelu", 1280)),
    pads=(END, "!"),
    fp16=True,
    extra={"force_zeros_for_empty_prompt": True},
)

# attention_head_dim is, for historical reasons, diffusers' name for the number of heads.
_MINI_UNET = {"layers_per_block": 1, "norm_num_groups": 8}
_MINI_VAE = {"block_out_channels": [16, 24, 32, 48], "layers_per_block": 1, "norm_num_groups": 4}
_MINI_TINY = {f"{part}_block_out_channels": [16] * 4 for part in ("encoder", "decoder")}
_SD_MINI_UNET = _MINI_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 64,
}
_SDXL_MINI_UNET = _MINI_UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32 + 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 64 + 6 * 32,
}

PRESETS: dict[str, Preset] = {
    "sd-turbo": _SD_TURBO,
    "sdxl-turbo": _SDXL_TURBO,
    "sd-turbo-mini": replace(
        _SD_TURBO,
        unet=_SD_TURBO.unet | _SD_MINI_UNET,
        vae=_SD_TURBO.vae | _MINI_VAE,
        tiny=_MINI_TINY,
        text=(_text(64, 3, 4, "gelu", 64),),
    ),
    "sdxl-turbo-mini": replace(
        _SDXL_TURBO,
        unet=_SDXL_TURBO.unet | _SDXL_MINI_UNET,
        vae=_SDXL_TURBO.vae | _MINI_VAE,
        tiny=_MINI_TINY,
        text=(_text(32, 2, 2, "quick_gelu", 32), _text(64, 3, 4, "gelu", 64)),
        fp16=False,
    ),
}
"""The checkpoints that `write_checkpoint` can write, by name."""

# The published settings that both families share.
_UNET: Config = {"sample_size": 64, "use_linear_projection": True}
_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_SCHEDULER: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}

# Weights are drawn from N(0, gain²/fan_in), so a gain of 1 keeps the scale of what goes in. The first match
# counts. Branches that are added to a residual stream are drawn smaller, for the stream not to grow with
# depth; what reads the prompt, the pooled embedding and the time larger, for the picture to depend on them.
_GAINS: tuple[tuple[str, float], ...] = (
    (r"token_embedding|position_embedding", 1.0),
    (r"time_embedding\.linear_1", 3.0),
    (r"add_embedding\.linear_1|time_emb_proj", 4.0),
    (r"attn2\.to_v", 4.0),
    (r"attn2\.to_out", 1.0),
    (r"attn\d\.to_out|ff\.net\.2|proj_out|out_proj|mlp\.fc2", 0.5),
    (r"post_quant_conv", 0.05),
    (r"quant_conv", 2.0),
    (r"decoder\.conv_out", 0.6),
    (r"layers\.\d+\.conv\.4", 0.5),
    (r"layers\.\d+\.conv", 1.4),  # before a ReLU, which halves the square
    (r"decoder\.layers\.18", 0.5),  # AutoencoderTiny's last
    (r"conv_out", 3.0),
    (r"", 1.0),
)
_SPREAD = 0.1  # of biases, and of norm weights around 1

_README = """---
license: apache-2.0
---
# {name}, with random weights

The architecture, configs and file layout of {name}; every weight is a random number drawn with seed {seed}.
It makes no meaningful pictures. It is for testing software and measuring speed. Written by turbochain.
"""
_LICENSE = """These weights are random numbers, and are licensed under the Apache License, Version 2.0.
You may obtain a copy of the License at https://www.apache.org/licenses/LICENSE-2.0
"""


def models(name: str, *, eos_token_id: int = 2) -> dict[str, torch.nn.Module]:
    """Component name → module of the preset `name`, on the meta device: shapes and config, no memory.

    `eos_token_id` is what the text encoders' configs say: 2, as published (transformers then pools at the
    largest id), or 49407, the true one (it pools at the first match). Raises InputError for an unknown name.
    """
    preset = _preset(name)

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    special = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 1}
    sizes = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": MAX_TOKENS}
    parts: dict[str, torch.nn.Module] = {}
    with torch.device("meta"):
        for i, config in enumerate(preset.text):
            kind = CLIPTextModelWithProjection if i else CLIPTextModel
            parts[_numbered("text_encoder", i)] = kind(CLIPTextConfig(**sizes, **special, **config))
        parts["unet"] = UNet2DConditionModel(**_UNET | preset.unet)
        parts["vae"] = AutoencoderKL(**_VAE | preset.vae)
    return parts


def write_checkpoint(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    eos_token_id: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the preset `name` into `folder` (created, overwritten) as a checkpoint that diffusers loads.

    The same seed gives the same weights (bit for bit on one machine; PyTorch's normal numbers differ in
    the last bits between CPU types). Weights are streamed to disk, one tensor in memory at a time.
    `eos_token_id` is as in `models`. `progress(done, total)` is called with numbers of parameters.
    Raises InputError for an unknown name, or where the package with the CLIP vocabulary is missing.
    """
    import diffusers

    preset = _preset(name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = models(name, eos_token_id=eos_token_id)
    index: Config = {
        "_class_name": preset.pipeline,
        "_diffusers_version": diffusers.__version__,
        **preset.extra,
    }

    for i, pad in enumerate(preset.pads):
        tokenizer = _numbered("tokenizer", i)
        (folder / tokenizer).mkdir(exist_ok=True)
        write_tokenizer(folder / tokenizer, pad_token=pad)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    getattr(diffusers, preset.scheduler)(**_SCHEDULER).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", preset.scheduler]

    total = sum(p.numel() for part in parts.values() for p in part.parameters())
    done, generator = 0, torch.Generator().manual_seed(seed)
    for component, part in parts.items():
        index[component] = ["transformers" if component.startswith("text") else "diffusers", type(part).__name__]
        for written in _write(part, folder / component, preset.fp16, generator):
            done += written
            if progress:
                progress(done, total)

    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(_README.format(name=name, seed=seed))
    (folder / "LICENSE").write_text(_LICENSE)


def write_tiny_vae(name: str, folder: Path, *, seed: int = 0) -> None:
    """Write into `folder` (created) an AutoencoderTiny with random weights that decodes the preset's latents."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        part = AutoencoderTiny(**_preset(name).tiny)
    for _ in _write(part, folder, False, torch.Generator().manual_seed(seed)):
        pass


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise InputError(f"There is no synthetic checkpoint {name!r}; expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _numbered(component: str, i: int) -> str:
    return f"{component}_{i + 1}" if i else component


def _write(part: torch.nn.Module, folder: Path, fp16: bool, generator: torch.Generator) -> Iterator[int]:
    """Write a component's config and its weights, tensor by tensor; yields each one's size."""
    _write_config(part, folder, fp16)
    file = "diffusion_pytorch_model" if hasattr(part, "save_config") else "model"
    yield from _write_weights(folder / f"{file}{'.fp16' if fp16 else ''}.safetensors", part, fp16, generator)


def _write_config(part: torch.nn.Module, folder: Path, fp16: bool) -> None:
    if hasattr(part, "save_config"):  # a diffusers model
        part.save_config(folder)
        return
    part.config.architectures = [type(part).__name__]
    part.config.dtype = "float16" if fp16 else "float32"
    part.config.save_pretrained(folder)


def _write_weights(path: Path, part: torch.nn.Module, fp16: bool, generator: torch.Generator) -> Iterator[int]:
    """Write random weights for `part`, tensor by tensor, as safetensors; yields each one's size."""
    # Published text encoders carry this prefix in every name; transformers 5 drops it when it loads.
    prefix = "text_model." if type(part).__name__ == "CLIPTextModel" else ""
    header: Config = {"__metadata__": {"format": "pt"}}
    tensors, end = part.state_dict(), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * (2 if fp16 else 4)
        header[prefix + name] = {
            "dtype": "F16" if fp16 else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # The format: the header's length as 8 bytes, the header padded to a multiple of 8, the tensors.
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors.items():
            values = _draw(name, tensor.shape, generator)
            file.write(values.to(torch.float16 if fp16 else torch.float32).numpy().data)
            yield values.numel()


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random float32 values for the parameter `name`: a bias, a norm's weight, or a matrix or convolution."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        middle = 0.5 if name == "decoder.layers.18.bias" else 0.0  # AutoencoderTiny's pictures are 0 to 1
        return values.mul_(_SPREAD).add_(1.0 if name.endswith("weight") else middle)
    fan_in = 1 if "embedding.weight" in name else prod(shape[1:])
    gain = next(gain for pattern, gain in _GAINS if re.search(pattern, name))
    values.mul_(gain / fan_in**0.5)
    if name == "quant_conv.weight":
        values[len(values) // 2 :] *= 0.1  # the log-variances; the encoder's noise grows with their exponential
    return values
