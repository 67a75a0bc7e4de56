"""Weights in one file → a folder in diffusers' format, with diffusers' own tables of names, component by component."""

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as names
from safetensors import safe_open
from safetensors.torch import save_file

from turbochain.export.sources import Want, synthetic
from turbochain.export.sources.checkpoint import Checkpoint, config_files_read
from turbochain.export.sources.original import Original
from turbochain.export.sources.presets import PRESETS
from turbochain.export.sources.weight_files import read_json
from turbochain.runtime.errors import InputError

_CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}
_DTYPES = {  # stored → written, of which each value of the stored one is a value
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float16, "F8_E5M2": torch.float16},
}
_WRAPPER = "text_model."  # of the text encoders' names, in some versions of transformers
_DIFFUSERS = ("down_blocks.", "encoder.down_blocks.")  # how names begin only there


def write_checkpoint(original: Original, config: str, folder: Path, want: Want) -> None:
    """Write a whole checkpoint into `folder` (created), but for the weights that `want` skips.

    `config`: as `original.settled`. Progress is in bytes. Raises InputError if the file lacks weights of the
    configuration, and what `want.before_weights` raises.
    """
    write_config(config, folder)
    components = [c for c in Checkpoint(folder).family.components if c not in want.skip]
    found = original.prefixes(components, config)
    counts, sizes = ({c: measure(original, prefix) for c, prefix in found.items()} for measure in (_values, _bytes))
    want.before_weights(folder, counts, sum(sizes.values()))
    done = 0
    for component, prefix in found.items():
        write_weights(original, component, prefix, folder / component, "choose the --config that it has")
        want.progress(done := done + sizes[component], sum(sizes.values()))


def write_config(config: str, folder: Path) -> None:
    """Write all of a checkpoint but its weights into `folder` (created), from a preset or a folder of such files."""
    if config in PRESETS:
        return synthetic.write_settings(config, folder)
    for path in config_files_read(Path(config)):
        target = folder / path.relative_to(config)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_part(original: Original, component: str, config: Mapping[str, Any] | None, folder: Path) -> None:
    """Write one component into `folder` (created): `config` as its config.json, and its weights.

    Raises InputError if there is no config, or the file lacks weights of it.
    """
    if config is None:
        raise InputError(
            f"--{component} {original.path} has no config.json of its own, and the checkpoint that it goes into has "
            f"none for it: give --{component} a folder in diffusers' format"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2), "utf-8")
    remedy = (
        f"give --{component} one with the shapes of the checkpoint's own, or a folder with a config.json of its own"
    )
    write_weights(original, component, original.prefix_alone(component), folder, remedy)


def write_weights(original: Original, component: str, prefix: str, folder: Path, remedy: str) -> None:
    """Write the weights of one component, whose names begin with `prefix`, beside its config.json.

    Raises InputError, which ends in `remedy`, if the config has others.
    """
    model = _skeleton(component, folder)
    expected = {name.removeprefix(_WRAPPER): tuple(t.shape) for name, t in model.state_dict().items()}
    tensors = _read(original, prefix)
    try:
        converted = _converted(tensors, component, prefix, model)
    except (KeyError, AttributeError, IndexError) as error:  # its tables meet a name or shape that is not there
        raise InputError(f"{original.path}: the {component} cannot be converted ({error}): {remedy}") from error
    _compare(original, component, expected, converted, remedy)
    stem = "model" if _is_text(component) else "diffusion_pytorch_model"
    written = {_published(component, name): converted[name].contiguous() for name in expected}
    save_file(written, folder / f"{stem}.safetensors", {"format": "pt"})


def _is_text(component: str) -> bool:
    return component.startswith("text_encoder")


def _published(component: str, name: str) -> str:
    """Return the name of a parameter in published folders, which every version of transformers reads."""
    return _WRAPPER + name if _is_text(component) and not name.startswith("text_projection") else name


def _skeleton(component: str, folder: Path) -> torch.nn.Module:
    """Return a component's model without memory, as its config.json has it."""
    kind = _CLASSES[component]
    with torch.device("meta"):
        if _is_text(component):
            return kind(transformers.CLIPTextConfig.from_pretrained(folder))
        return kind.from_config(read_json(folder / "config.json"))


def _read(original: Original, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, named without it. Raises InputError for an unknown dtype."""
    found = {}
    with safe_open(original.path, framework="pt") as file:
        for name, (dtype, _) in original.tensors.items():
            if not name.startswith(prefix) or name.endswith("position_ids"):
                continue
            if dtype not in _DTYPES:
                raise InputError(
                    f"{original.path} stores {name} as {dtype}, and fp32, fp16, bf16 or unscaled fp8 was expected: "
                    "take a file in one of these"
                )
            found[name.removeprefix(prefix)] = file.get_tensor(name).to(_DTYPES[dtype])
    return found


def _converted(tensors: dict[str, torch.Tensor], component: str, prefix: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in the model's names, those of text encoders without `text_model.`."""
    if component == "unet" and not any(n.startswith(_DIFFUSERS) for n in tensors):
        whole = {names.LDM_UNET_KEY + n: t for n, t in tensors.items()}
        tensors = names.convert_ldm_unet_checkpoint(whole, model.config)
    elif component == "vae" and not any(n.startswith(_DIFFUSERS) for n in tensors):
        tensors = names.convert_ldm_vae_checkpoint(tensors, model.config)
    elif prefix.endswith(".model."):
        tensors = names.convert_open_clip_checkpoint(model, tensors, prefix="")
    return {n.removeprefix(_WRAPPER): t for n, t in tensors.items() if t is not None}


def _compare(
    original: Original,
    component: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, torch.Tensor],
    remedy: str,
) -> None:
    """Raise InputError if the file has other tensors of a component than its config.

    A text encoder may have more: SD 2.x stores a last layer that is not used.
    """
    if missing := [n for n in expected if n not in found]:
        raise InputError(
            f"{original.path} lacks {', '.join(missing[:5])} of the {component} ({len(missing)} in all): download it "
            f"again, or {remedy}"
        )
    wrong = [
        f"{n} is {list(found[n].shape)} and should be {list(s)}" for n, s in expected.items() if found[n].shape != s
    ]
    if wrong:
        raise InputError(
            f"{original.path} has weights of the {component} in another shape ({', '.join(wrong[:5])}; {len(wrong)} in "
            f"all): {remedy}"
        )
    more = [n for n in found if n not in expected]
    if more and not _is_text(component):
        raise InputError(
            f"{original.path} has weights of the {component} that the configuration does not have ({more[0]}; "
            f"{len(more)} in all): {remedy}"
        )


def _values(original: Original, prefix: str) -> int:
    return sum(prod(shape) for name, (_, shape) in original.tensors.items() if name.startswith(prefix))


def _bytes(original: Original, prefix: str) -> int:
    """Return how many bytes are written for the tensors whose names begin with `prefix`."""
    own = [stored for name, stored in original.tensors.items() if name.startswith(prefix)]
    return sum(prod(shape) * _DTYPES.get(dtype, torch.float32).itemsize for dtype, shape in own)
