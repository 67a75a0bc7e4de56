"""The synthetic checkpoints by name: diffusers' and transformers' configs for their parts. Torch-free."""

from dataclasses import dataclass, field, replace
from typing import Any

from turbochain.export.sources.vocabulary import END
from turbochain.runtime.errors import InputError

Config = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """What tells one synthetic checkpoint from another: the diffusers and transformers configs of its parts.

    `text` and `pads` (the padding tokens) have one entry per text encoder; the second one projects.
    `fp16` stores the weights as float16, in the file names of diffusers' "fp16" variant. `settings` are what the
    published scheduler_config.json has besides `SCHEDULER`, and no more: `CLASS.from_config` of another class inherits
    what a file names, even if its own class never reads it, and takes its own defaults for the rest.
    """

    pipeline: str
    scheduler: str
    unet: Config
    vae: Config
    tiny: Config
    text: tuple[Config, ...]
    pads: tuple[str, ...]
    settings: Config
    extra: Config = field(default_factory=dict)
    fp16: bool = False


def _text(width: int, layers: int, heads: int, act: str, projection: int) -> Config:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act}


SCHEDULER: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
}
"""What every published scheduler_config.json of these models has."""

# What a class does not read is in the files all the same: they were made of the config of another class.
_PNDM: Config = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
_EULER_ANCESTRAL = _PNDM | {"prediction_type": "epsilon", "interpolation_type": "linear", "sample_max_value": 1.0}
_EULER = _EULER_ANCESTRAL | {"use_karras_sigmas": False}
_TRAILING: Config = {"timestep_spacing": "trailing"}
_LEADING: Config = {"timestep_spacing": "leading"}

_SD_TURBO = Preset(
    pipeline="StableDiffusionPipeline",
    scheduler="EulerDiscreteScheduler",
    unet={"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
    vae={"sample_size": 768, "scaling_factor": 0.18215},
    tiny={},  # TAESD's are diffusers' defaults
    text=(_text(1024, 23, 16, "gelu", 512),),
    pads=("!",),
    settings=_EULER | _TRAILING | {"sigma_max": None, "sigma_min": None, "timestep_type": "discrete"},
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
    settings=_EULER_ANCESTRAL | _TRAILING,
    fp16=True,
    extra={"force_zeros_for_empty_prompt": True},
)

_SD15 = replace(
    _SD_TURBO,
    scheduler="PNDMScheduler",
    settings=_PNDM,
    unet={"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
    vae={"sample_size": 512, "scaling_factor": 0.18215},
    text=(_text(768, 12, 12, "quick_gelu", 768),),
    pads=(END,),
)
_SD21_BASE = replace(_SD_TURBO, scheduler="PNDMScheduler", settings=_PNDM | {"prediction_type": "epsilon"})
_SD21 = replace(  # trained further, at 768×768
    _SD_TURBO,
    scheduler="DDIMScheduler",
    settings=_PNDM | {"prediction_type": "v_prediction"},
    unet=_SD_TURBO.unet | {"sample_size": 96, "upcast_attention": True},
)
_LCM: Config = {
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "original_inference_steps": 50,
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_LCM_SD15 = replace(
    _SD15,
    pipeline="LatentConsistencyModelPipeline",
    scheduler="LCMScheduler",
    settings=_LCM,
    unet=_SD15.unet | {"time_cond_proj_dim": 256},
)
_SDXL = replace(
    _SDXL_TURBO,
    scheduler="EulerDiscreteScheduler",
    settings=_EULER | _LEADING,
    unet=_SDXL_TURBO.unet | {"sample_size": 128},
)
_LCM_SDXL = replace(  # the scheduler is what from_config makes of SDXL's
    _SDXL,
    scheduler="LCMScheduler",
    settings=_LCM | {"steps_offset": 1, "set_alpha_to_one": False},
    unet=_SDXL.unet | {"time_cond_proj_dim": 256},
)

# attention_head_dim is, for historical reasons, diffusers' name for the number of heads.
_MINI_UNET = {"layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": [32, 64]}
_MINI_VAE = {"block_out_channels": [16, 24, 32, 48], "layers_per_block": 1, "norm_num_groups": 4}
_MINI_TINY = {f"{part}_block_out_channels": [16] * 4 for part in ("encoder", "decoder")}
_SD_MINI_UNET = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 64,
}
_SD15_MINI_UNET = _SD_MINI_UNET | {"attention_head_dim": 4, "cross_attention_dim": 48}
_SDXL_MINI_UNET = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32 + 64,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 64 + 6 * 32,
}
_SD15_MINI_TEXT = _text(48, 3, 4, "quick_gelu", 48)
_SDXL_MINI_TEXT = (_text(32, 2, 2, "quick_gelu", 32), _text(64, 3, 4, "gelu", 64))


def _mini(full: Preset, unet: Config, *text: Config) -> Preset:
    """Return the preset at narrow widths, in float32."""
    condition = {"time_cond_proj_dim": 32} if "time_cond_proj_dim" in full.unet else {}
    return replace(
        full,
        unet=full.unet | _MINI_UNET | unet | condition,
        vae=full.vae | _MINI_VAE,
        tiny=_MINI_TINY,
        text=text,
        fp16=False,
    )


PRESETS: dict[str, Preset] = {
    "sd-turbo": _SD_TURBO,
    "sdxl-turbo": _SDXL_TURBO,
    "sd-turbo-mini": _mini(_SD_TURBO, _SD_MINI_UNET, _text(64, 3, 4, "gelu", 64)),
    "sdxl-turbo-mini": _mini(_SDXL_TURBO, _SDXL_MINI_UNET, *_SDXL_MINI_TEXT),
    "sd15": _SD15,
    "sd15-mini": _mini(_SD15, _SD15_MINI_UNET, _SD15_MINI_TEXT),
    "sd21": _SD21,
    "sd21-base": _SD21_BASE,
    "sdxl": _SDXL,
    "sdxl-mini": _mini(_SDXL, _SDXL_MINI_UNET, *_SDXL_MINI_TEXT),
    "lcm-sd15": _LCM_SD15,
    "lcm-sd15-mini": _mini(_LCM_SD15, _SD15_MINI_UNET, _SD15_MINI_TEXT),
    "lcm-sdxl": _LCM_SDXL,
    "lcm-sdxl-mini": _mini(_LCM_SDXL, _SDXL_MINI_UNET, *_SDXL_MINI_TEXT),
}
"""The checkpoints that `write_checkpoint` can write, by name."""


def preset(name: str) -> Preset:
    """Return the preset `name`; InputError that names them all if there is none."""
    if name not in PRESETS:
        raise InputError(f"there is no synthetic checkpoint {name!r}: choose {', '.join(PRESETS)}")
    return PRESETS[name]
