"""The weight files of one component's folder: plain, sharded or of a variant; pickles and LoRAs are refused."""

import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from turbochain.runtime.bundle import lfs
from turbochain.runtime.errors import InputError

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name for a component's weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_OF_LORA = re.compile(r"\.base_layer\.|(?:^|[._])lora[._]")  # peft's names, and those that diffusers once gave


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """Return the safetensors files of one component's folder; InputError if there are none."""
    found = _found(folder, variant)
    if not found and variant is not None:  # hub folders give some components without the variant
        found = _found(folder, None)
    if found:
        return found
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES]
    if pickles:
        raise InputError(
            f"{folder} has its weights only as {pickles[0]}, and pickles are refused because loading one runs code; "
            "convert it: load it with diffusers and call save_pretrained(FOLDER, safe_serialization=True)"
        )
    if (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is a whole checkpoint, and the folder of one component was expected: give one, such as "
            f"{folder / 'unet'}"
        )
    others = ", ".join(map(repr, variants_of(folder)))
    hint = f"; it has the variant {others}" if others else ""
    named = f" of variant {variant!r}" if variant else ""
    raise InputError(f"{folder} has no safetensors weights{named}{hint}")


def part_files_read(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a component that an export reads; InputError if it has no weights."""
    found = part_files(folder, variant)
    refuse_pointers(*found)
    return found


def part_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the files of a component that are there; InputError if it has no weights."""
    weights = weight_files(folder, variant)
    used = variant if any(f".{variant}" in path.name for path in weights) else None
    found = [folder / "config.json", *(_named(folder, stem, used)[1] for stem in STEMS), *weights]
    return [path for path in found if path.is_file()]


def refuse_pointers(*paths: Path) -> None:
    """Raise InputError if one of the files is a Git LFS pointer."""
    if pointers := [path for path in paths if lfs.is_pointer(path)]:
        more = f" (and {len(pointers) - 1} more)" if len(pointers) > 1 else ""
        folder = pointers[0].parent
        raise InputError(f"{pointers[0]}{more} is a Git LFS pointer, not the file itself. {lfs.remedy(folder)}")


def _found(folder: Path, variant: str | None) -> tuple[Path, ...]:
    for stem in STEMS:
        single, index = _named(folder, stem, variant)
        if index.is_file() and (stem == STEMS[0] or not single.is_file()):  # of both diffusers reads the shards
            return _shards(index)
        if single.is_file():
            return (single,)
    return ()


def _named(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Return the paths that weights in one file have, and that the index has for weights in several."""
    infix = f".{variant}" if variant else ""
    return folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise InputError(f"{index} should map every weight to the name of a file beside it")
    return tuple(index.parent / name for name in sorted(set(names.values())))


def variants_of(*folders: Path) -> list[str]:
    """Return the variants of the weight files in components' folders, such as fp16."""
    pattern = rf"(?:{'|'.join(STEMS)})(?:\.safetensors\.index)?\.(\w+)\.(?:safetensors|json)"
    names = (re.fullmatch(pattern, p.name) for folder in folders for p in folder.glob("*"))
    return sorted({m[1] for m in names if m and m[1] != "index"})


def settled_variant(folders: Sequence[Path], wanted: str | None) -> str | None:
    """Return `wanted`, or if that is None and there are no plain weights, the only variant that there is."""
    variants = variants_of(*folders)
    plain = any(_found(folder, None) for folder in folders)
    return variants[0] if wanted is None and len(variants) == 1 and not plain else wanted


def values_in(path: Path) -> int:
    """Return the number of values in a safetensors file; InputError if it is damaged or holds a LoRA beside weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            count = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download the checkpoint again") from None
    except (OSError, SafetensorError) as error:
        refuse_pointers(path)
        raise InputError(f"{path} is damaged ({error}); download it again") from None
    refuse_lora(path, names)
    return count


def refuse_lora(path: Path, names: Collection[str]) -> None:
    """Raise InputError if tensors of these names are a LoRA, or weights into which one is not fused."""
    found = [name for name in names if _OF_LORA.search(name)]
    if found and len(found) == len(names) and not any(".base_layer." in name for name in found):
        raise InputError(
            f"{path} is a LoRA ({found[0]}; {len(found)} tensors), and weights of a model were expected: give the "
            "checkpoint that it is for, and --lora with this file"
        )
    if found:
        raise InputError(
            f"{path} was saved with a LoRA that is not fused into the weights ({found[0]}; {len(found)} such in "
            "all): load the model and the LoRA as before, call pipe.fuse_lora(), pipe.unload_lora_weights() and "
            "pipe.save_pretrained(FOLDER), and build from that folder"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; InputError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        refuse_pointers(path)
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} cannot be read: a JSON object was expected")
    return value
