"""Weights in one safetensors file, with the names of the programs that trained them (ldm, sgm, open_clip).

What such a file holds, and whose configuration it has, is read from its header, without torch.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.export.sources.checkpoint import config_files_read
from turbochain.export.sources.presets import PRESETS
from turbochain.export.sources.weight_files import PICKLES, refuse_lora, refuse_pointers
from turbochain.runtime.errors import InputError

PREFIXES: dict[str, tuple[str, ...]] = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "cond_stage_model.model.",  # this one and the next in open_clip's names
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
    "unet": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
}
"""Component → how the names of its tensors may begin in the file of a whole checkpoint."""

CHECKPOINT = "checkpoint.safetensors"
"""The name among the files requested for that of a whole checkpoint, whatever its own."""

CONFIGS = ("sd15", "sd21", "sd21-base", "sd-turbo", "sdxl", "sdxl-turbo")
"""The presets that are published in one file, too."""

_ALONE = {  # component → how a name begins in the file of one alone, in the original names and in diffusers'
    "unet": ("input_blocks.", "down_blocks."),
    "vae": ("encoder.down.", "encoder.down_blocks."),
}
_SCALES = ("scaled_fp8", "scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant")
_EDM = "edm_"  # how names begin that tell of EDM's noise: edm_mean of Playground v2.5, edm_vpred of CosXL
_CROSS_ATTENTION = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight")
_TOLD = {  # values that the cross-attention reads, a prefix that the file then has → the configuration
    (768, "cond_stage_model.transformer."): "sd15",
    (2048, "conditioner.embedders.1.model."): "sdxl",
}


@dataclass(frozen=True)
class Original:
    """A file, and what its header says."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # name → (dtype, as safetensors names it, and shape)

    def has(self, prefix: str) -> bool:
        """Return whether a tensor's name begins with this."""
        return any(name.startswith(prefix) for name in self.tensors)

    def prefix(self, component: str) -> str | None:
        """Return how a component's tensors' names begin; None if the file lacks the component."""
        return next((prefix for prefix in PREFIXES[component] if self.has(prefix)), None)

    def prefixes(self, components: Collection[str], config: str) -> dict[str, str]:
        """Return component → prefix. Raises InputError, which speaks of `config`, if the file lacks a component."""
        found = {c: prefix for c in components if (prefix := self.prefix(c)) is not None}
        missing = [c for c in components if c not in found]
        if missing == ["vae"]:
            raise InputError(f"{self.path} has no VAE, and none was named: give one with --vae")
        if missing:
            raise InputError(
                f"{self.path} has no {' and no '.join(missing)} in the original names, and a whole checkpoint of "
                f"--config {config} was expected: choose another --config, or give a UNet or a VAE alone with --unet "
                "or --vae, beside a checkpoint"
            )
        return found

    def prefix_alone(self, component: str) -> str:
        """Return `prefix`, or "" for a file of this component alone. Raises InputError if it is neither."""
        found = "" if any(map(self.has, _ALONE[component])) else self.prefix(component)
        if found is None:
            raise InputError(
                f"--{component} {self.path}: the file has no tensor of a {component}, in the original names or in "
                "diffusers': give the file of one, or of a checkpoint with one"
            )
        return found

    def guess(self) -> str | None:
        """Return the configuration that the file surely has, but for its scheduler; None if several are possible."""
        widths = {shape[-1] for name, (_, shape) in self.tensors.items() if _CROSS_ATTENTION.fullmatch(name)}
        told = [config for (width, prefix), config in _TOLD.items() if widths == {width} and self.has(prefix)]
        return told[0] if told and "v_pred" not in self.tensors else None


def refuse_others(path: Path) -> None:
    """Raise InputError if a file cannot be read or is not safetensors, by its suffix and its first bytes."""
    refuse_pointers(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)  # of safetensors: the length of its header, and the header's brace
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix in PICKLES or (start.startswith((b"PK", b"\x80")) and start[8:] != b"{"):
        raise InputError(
            f"{path} is a pickle, and a .safetensors file was expected because loading a pickle runs code: if you "
            "trust it, load it with torch.load(..., weights_only=True) and write it with safetensors.torch.save_file"
        )
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is a file; a .safetensors file or a folder in diffusers' format was expected: convert it with the "
            "program that wrote it"
        )


def read(path: Path) -> Original:
    """Return what the header of a file with weights says.

    Raises InputError if it is damaged, quantised with scales, a LoRA, or has one that is not fused.
    """
    original = read_any(path)
    refuse_lora(path, original.tensors)
    return original


def read_any(path: Path) -> Original:
    """Return what the header of a file says; unlike `read` it takes a LoRA too."""
    from safetensors import SafetensorError, safe_open

    refuse_others(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            tensors = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None
    if scales := [name for name in tensors if name.rpartition(".")[2] in _SCALES]:
        raise InputError(
            f"{path} is quantised, with scales in tensors of their own ({scales[0]}; {len(scales)} such in all), and "
            "plain weights were expected: take the file in fp16, bf16 or unscaled fp8"
        )
    return Original(path, tensors)


def settled(path: Path, config: str | None) -> tuple[str, bool]:
    """Return the configuration of a file, and whether it is a guess: a preset's name, or a folder's path.

    Raises InputError if `config` is neither, or is None and several are possible, or none.
    """
    choices = f"{', '.join(CONFIGS)}, or a folder with the JSON files of one in diffusers' format"
    if config is None:
        if (guess := _of_known_noise(read(path)).guess()) is None:
            raise InputError(f"{path} does not tell its configuration: name it with --config: {choices}")
        return guess, True
    if config not in PRESETS and not Path(config).is_dir():
        raise InputError(f"--config {config} is no configuration: expected {choices}")
    return config, False


def _of_known_noise(original: Original) -> Original:
    """Return the header. Raises InputError if it says that the model was trained with other noise than `CONFIGS`
    have."""
    if (name := next((name for name in original.tensors if name.startswith(_EDM)), None)) is not None:
        raise InputError(
            f"{original.path} was trained with EDM's noise, as Playground v2.5 and CosXL were (it has {name}), and "
            "that of SD or SDXL was expected: build the model's folder in diffusers' format, or give --config one "
            "with its JSON files"
        )
    return original


def files_read(path: Path, config: str, scheduler: Mapping[str, Any]) -> dict[str, Path]:
    """Return what an export reads of a file and its settled configuration: name in the checkpoint → file.

    `scheduler`: the changes of the scheduler's config that are asked for. Raises InputError if the file is refused, if
    it predicts something else than a preset's scheduler expects or other noise, or if a folder with the configuration
    lacks files.
    """
    tensors = (_of_known_noise(read(path)) if config in PRESETS else read(path)).tensors
    if config in PRESETS and "v_pred" in tensors:
        expected = {**PRESETS[config].settings, **scheduler}.get("prediction_type")
        needed = {"prediction_type": "v_prediction", **({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {})}
        if expected != needed["prediction_type"]:
            raise InputError(
                f"{path} says that it predicts v, and the scheduler of --config {config} expects a model that predicts "
                f"noise: give --scheduler '{json.dumps(needed)}' (add \"_class_name\" for a class)"
            )
    folder = Path(config)
    found = [] if config in PRESETS else config_files_read(folder)
    return {CHECKPOINT: path, **{str(p.relative_to(folder)): p for p in found}}
