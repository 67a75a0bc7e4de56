"""Where a checkpoint comes from, and what can be said of it without torch.

A source is a hub id, a local folder in diffusers' format, `synthetic:NAME`, or a bundle (which needs no
export). Everything ends as a `Checkpoint` on disk whose files have been looked at before any are loaded.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from turbochain.export import families
from turbochain.export.families import Family
from turbochain.runtime.errors import InputError

SYNTHETIC = "synthetic:"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name for a component's weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


@dataclass(frozen=True)
class Checkpoint:
    """A folder in diffusers' format whose weights are safetensors, complete and of a supported family."""

    folder: Path
    variant: str | None  # "fp16" where the weights are model.fp16.safetensors

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        path = self.folder / "model_index.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder} has no model_index.json, so it is not a checkpoint in diffusers' format; convert a "
                "single file with diffusers' from_single_file(...).save_pretrained(FOLDER)"
            )
        return read_json(path)

    @property
    def family(self) -> Family:
        """The family of its pipeline class; InputError where that is not supported."""
        return families.of(str(self.index.get("_class_name")))

    @cached_property
    def configs(self) -> dict[str, Any]:
        """config.json of every component with weights."""
        return {c: read_json(self.folder / c / "config.json") for c in self.family.components}

    @cached_property
    def weights(self) -> dict[str, tuple[Path, ...]]:
        """Component → its safetensors files (several where it is sharded)."""
        return {c: weight_files(self.folder / c, self.variant) for c in self.family.components}

    def parameters(self, component: str) -> int:
        """Number of values in a component's weight files, read from their headers."""
        return sum(_values(path) for path in self.weights[component])

    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        card = self.folder / "README.md"
        front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.S) if card.is_file() else None
        found = dict(re.findall(r"^(license(?:_name)?): *['\"]?([^'\"\n]+)", front[1], re.M)) if front else {}
        return found.get("license_name") or found.get("license")


def open_folder(folder: Path, variant: str | None) -> Checkpoint:
    """A checked checkpoint; InputError lists every problem of the folder at once."""
    checkpoint = Checkpoint(folder, variant)
    family = checkpoint.family
    missing = [c for c in family.components if not (folder / c / "config.json").is_file()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(f'{c}/config.json' for c in missing)}")
    if problems := family.check(checkpoint.configs):
        raise InputError(f"{folder} is not supported: " + "; ".join(problems))
    if variant is None and not any(_found(folder / c, None) for c in family.components):
        variants = sorted({v for c in family.components for v in _variants(folder / c)})
        if len(variants) == 1:  # an fp16-only folder is recognised by itself
            checkpoint = Checkpoint(folder, variants[0])
    for component in family.components:
        for path in checkpoint.weights[component]:
            _values(path)
    return checkpoint


def weight_files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The safetensors files of one component's folder; InputError where there are none."""
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
    others = ", ".join(map(repr, _variants(folder)))
    hint = f"; it has the variant {others}" if others else ""
    named = f" of variant {variant!r}" if variant else ""
    raise InputError(f"{folder} has no safetensors weights{named}{hint}")


def _found(folder: Path, variant: str | None) -> tuple[Path, ...]:
    infix = f".{variant}" if variant else ""
    for stem in STEMS:
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            return tuple(folder / name for name in sorted(set(read_json(index)["weight_map"].values())))
    return ()


def _variants(folder: Path) -> list[str]:
    pattern = rf"(?:{'|'.join(STEMS)})(?:\.safetensors\.index)?\.(\w+)\.(?:safetensors|json)"
    names = (re.fullmatch(pattern, p.name) for p in folder.glob("*"))
    return sorted({m[1] for m in names if m and m[1] != "index"})


def _values(path: Path) -> int:
    """Values in a safetensors file; InputError where its header is damaged or its size is not what it says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        expected = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        if path.stat().st_size != expected:
            raise ValueError(f"it has {path.stat().st_size} bytes and its header describes {expected}")
        return sum((t["data_offsets"][1] - t["data_offsets"][0]) // _SIZES[t["dtype"]] for t in header.values())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download the checkpoint again") from None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None


def read_json(path: Path) -> Any:
    """A JSON file; InputError where it is missing or malformed."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
