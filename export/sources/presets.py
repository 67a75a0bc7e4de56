"""The synthetic checkpoints: diffusers' and transformers' configs of their parts, by name. Torch-free."""

from dataclasses import dataclass, field, replace
from typing import Any

from turbochain.export.sources.vocabulary import END
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


def preset(name: str) -> Preset:
    """Return the preset `name`; InputError that names them all if there is none."""
    if name not in PRESETS:
        raise InputError(f"There is no synthetic checkpoint {name!r}; expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]
