"""Read LoRA files: which parameters of a checkpoint they change, and by what.

A LoRA (Low-Rank Adaptation) adds to a weight matrix W the product of two small ones: W + scale · up · down.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbochain.runtime.bundle import lfs
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import adapter_names

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Component ("unet", "text_encoder", "text_encoder_2") → parameter's name in the checkpoint → shape."""

_ENDS = {
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",  # peft, diffusers
    ".lora_B.weight": "up",
    "_lora.down.weight": "down",  # diffusers before peft: attn1.processor.to_q_lora.down.weight
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "/down": "down",  # our own: COMPONENT/PARAMETER/down, see adapter_files
    "/up": "up",
    "/scale": "scale",
}
"""The end of a tensor's name → its role in the layer that the rest of the name says."""

_OTHER_KINDS = {
    ".dora_scale.": "DoRA",
    ".lora_magnitude_vector.": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".lora_mid.": "a Tucker decomposition",
    ".diff.": "full differences of weights",
    ".diff_b.": "full differences of biases",
    ".bias.": "changes of biases",
}
"""A part of a tensor's name, with a dot behind it → the kind of adapter, which adds more than a product of two."""

_METADATA = "lora_adapter_metadata"  # where diffusers writes peft's LoraConfig of each component
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: scale · up · down."""

    down: np.ndarray  # [rank, in] or, of a convolution, [rank, in, height, width]; float16, 32 or 64
    up: np.ndarray  # [out, rank] or [out, rank, 1, 1]
    scale: float  # alpha / rank; 1 if the file has no alpha

    @property
    def rank(self) -> int:
        """Return the rank of the product."""
        return len(self.down)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file that has been read for one checkpoint."""

    path: Path
    components: Mapping[str, Mapping[str, LowRank]]  # component → parameter's name in the checkpoint → what is added


def read(path: str | os.PathLike[str], shapes: Shapes) -> Adapter:
    """Return what a LoRA file in safetensors format adds to a checkpoint's parameters of these names and shapes.

    The file's names may be kohya's (with diffusers' or Stability AI's names of the UNet's blocks), peft's, those that
    diffusers used before, or our own (see `adapter_files`). The arrays are views of the mapped file, but for
    bfloat16, which becomes float32. Raises InputError if the file cannot be read, is no LoRA, or does not fit the
    checkpoint.
    """
    path = Path(path)
    tensors, metadata = _open(path)
    known = adapter_names.spellings(shapes) | {
        f"{c}/{name}": (c, name) for c, names in shapes.items() for name in names
    }
    found: dict[tuple[str, str], dict[str, str]] = {}  # (component, parameter) → down, up, alpha → tensor's name
    for name in tensors:
        module, role = _parse(path, name)
        place = known.get(module.replace(".processor.", "."))
        if place is None:
            raise InputError(
                f"{path} changes {module}, and this checkpoint has no layer of that name; choose a LoRA that was "
                "trained for this model (SD 1.x, SD 2.x and SDXL each have their own)"
            )
        if role in found.setdefault(place, {}):
            raise InputError(
                f"{path} changes {place[1]} of the {place[0]} twice ({found[place][role]} and {name}), and once was "
                "expected; remove one of the two from the file"
            )
        found[place][role] = name
    components: dict[str, dict[str, LowRank]] = {}
    for (component, parameter), names in found.items():
        given = {role: _finite(path, name, tensors[name]) for role, name in names.items()}
        down, up = _pair(path, parameter, shapes[component][parameter], given)
        scale = _scale(path, given, len(down), metadata, component, parameter)
        components.setdefault(component, {})[parameter] = LowRank(down, up, scale)
    return Adapter(path, components)


def _open(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Return the tensors of a file, mapped, and peft's configs as diffusers writes them into its metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise InputError(f"{path} is missing; a LoRA file was expected there: check the path")
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a LoRA file was expected; name the one in it")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no safetensors file, and others are refused because loading a pickle runs code; load it where "
            "it was made and save its tensors with safetensors.torch.save_file"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
        # The library has checked the header. For numpy it copies each tensor, and cannot make one of bfloat16, so the
        # arrays are views of the mapped file that is read here.
        raw = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + size].tobytes())
        config = json.loads(metadata.get(_METADATA) or "{}")
    except (OSError, SafetensorError, ValueError) as error:
        if lfs.is_pointer(path):
            raise InputError(f"{path} is a Git LFS pointer, not the file itself. {lfs.remedy(path.parent)}") from None
        raise InputError(f"{path} is no readable safetensors file ({error}); download or save it again") from None
    if unreadable := next((n for n in sorted(names) if header[n]["dtype"] not in _DTYPES), None):
        raise InputError(
            f"{path} holds {unreadable} as {header[unreadable]['dtype']}, and {', '.join(_DTYPES)} were expected; "
            "convert it to F16"
        )
    if not names:
        raise InputError(f"{path} holds no tensor, and those of a LoRA were expected; download or save it again")
    data = raw[8 + size :]
    return {name: _array(data, header[name]) for name in sorted(names)}, config if isinstance(config, dict) else {}


def _array(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    stored = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return (stored.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else stored


def _parse(path: Path, name: str) -> tuple[str, str]:
    """Return the module that a tensor belongs to, and its role there; InputError if it is not part of a LoRA."""
    if kind := next((kind for part, kind in _OTHER_KINDS.items() if part in f"{name}."), None):
        raise InputError(
            f"{path} holds {kind} ({name}), and a LoRA was expected, which adds products of two matrices and nothing "
            "else; fuse it into the checkpoint with the program that made it, and use that checkpoint"
        )
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if end is None:
        raise InputError(
            f"{path} holds {name}, and only tensors of a LoRA were expected, such as NAME.lora_down.weight or "
            "NAME.lora_A.weight; choose a LoRA file"
        )
    return name.removesuffix(end), _ENDS[end]


def _finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise InputError(f"{path} holds NaN or infinity in {name}, and numbers were expected; train or save it again")
    return array


def _pair(
    path: Path, parameter: str, shape: tuple[int, ...], given: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a module's `down` and `up`; InputError if one is missing or they do not fit a weight of this shape."""
    if missing := [role for role in ("down", "up") if role not in given]:
        raise InputError(
            f"{path} has no {missing[0]} matrix for {parameter}, and one of each kind was expected; download it again"
        )
    down, up = given["down"], given["up"]
    rank = up.shape[1] if up.ndim > 1 else 0
    expected = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    if not rank or (down.shape, up.shape) != expected:
        raise InputError(
            f"{path} has the matrices {list(down.shape)} and {list(up.shape)} for {parameter}, whose shape is "
            f"{list(shape)}: they do not fit; choose a LoRA that was trained for this model"
        )
    return down, up


def _scale(
    path: Path,
    given: Mapping[str, np.ndarray],
    rank: int,
    metadata: Mapping[str, Any],
    component: str,
    parameter: str,
) -> float:
    """Return a module's scale: its own, of its own alpha, or of peft's config in the file's metadata."""
    for role in (role for role in ("scale", "alpha") if role in given):
        if given[role].size != 1:
            raise InputError(
                f"{path}: the {role} of {parameter} has the shape {list(given[role].shape)}; one number was expected"
            )
        value = float(given[role].reshape(()))
        return value if role == "scale" else value / rank
    prefix = f"{component}."
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not config:  # of a UNet alone
        config = dict(metadata) if component == "unet" and "lora_alpha" in metadata else {"lora_alpha": rank}
    alphas = [*_patterns(config, parameter), config.get("lora_alpha", 8)]  # 8: peft's default
    if isinstance(alphas[0], bool) or not isinstance(alphas[0], int | float) or not math.isfinite(alphas[0]):
        raise InputError(f"{path}: its metadata gives {alphas[0]!r} as the alpha of {parameter}; a number was expected")
    return alphas[0] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterns(config: Mapping[str, Any], parameter: str) -> Iterator[Any]:
    """Yield the alphas that peft's `alpha_pattern` gives a parameter's module: its keys are names or ends of names."""
    module = parameter.removesuffix(".weight")
    names = {module, module.removeprefix(adapter_names.TEXT)}
    pattern = config.get("alpha_pattern")
    for key, alpha in pattern.items() if isinstance(pattern, dict) else ():
        if any(name == key.removeprefix("^") or name.endswith(f".{key}") for name in names):
            yield alpha
