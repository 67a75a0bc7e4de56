"""Where a checkpoint comes from, and what can be said of it without torch.

A source is a hub id, a local folder in diffusers' format, `demo` (the small trained checkpoint that is part of
this package), `synthetic:NAME`, or a bundle (which needs no export). Everything ends as a `Checkpoint` on disk
whose files have been looked at before any are loaded.
"""

import json
import math
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
DEMO = "demo"
KINDS = f"neither a folder here, nor a hub id (owner/name), nor {DEMO}, nor {SYNTHETIC}NAME"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name for a component's weights
LIBRARIES = ("diffusers", "transformers")  # model_index.json can name any module; no other is imported
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def local(source: str) -> Path:
    """Where a source lies that is on this disk: the package's own checkpoint for "demo", else the path `source`."""
    return Path(__file__).parents[1] / DEMO if source == DEMO else Path(source)


@dataclass(frozen=True)
class Checkpoint:
    """A folder in diffusers' format whose weights are safetensors, complete and of a supported family."""

    folder: Path
    variant: str | None  # "fp16" where the weights are model.fp16.safetensors
    vae: Path | None = None  # the folder of a VAE that takes the place of its own

    def part(self, name: str) -> Path:
        """The folder of a component."""
        return self.vae if self.vae and name == "vae" else self.folder / name

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json, as it would be with the VAE that takes the place of its own."""
        path = self.folder / "model_index.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder} has no model_index.json, so it is not a checkpoint in diffusers' format; convert a "
                "single file with diffusers' from_single_file(...).save_pretrained(FOLDER)"
            )
        index = read_json(path)
        if self.vae:
            index["vae"] = ["diffusers", read_json(self.vae / "config.json").get("_class_name")]
        return index

    @property
    def family(self) -> Family:
        """The family of its pipeline class; InputError where that is not supported."""
        return families.of(str(self.index.get("_class_name")))

    @cached_property
    def configs(self) -> dict[str, Any]:
        """config.json of every component with weights."""
        return {c: read_json(self.part(c) / "config.json") for c in self.family.components}

    @cached_property
    def weights(self) -> dict[str, tuple[Path, ...]]:
        """Component → its safetensors files (several where it is sharded)."""
        return {c: weight_files(self.part(c), self.variant) for c in self.family.components}

    def parameters(self, component: str) -> int:
        """Number of values in a component's weight files, read from their headers."""
        return sum(_values(path) for path in self.weights[component])

    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        card = self.folder / "README.md"
        front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.S) if card.is_file() else None
        found = dict(re.findall(r"^(license(?:_name)?): *['\"]?([^'\"\n]+)", front[1], re.M)) if front else {}
        return found.get("license_name") or found.get("license")


def check_configs(checkpoint: Checkpoint) -> None:
    """InputError where the classes and configs, without the weights, are not of a supported family."""
    folder, family = checkpoint.folder, checkpoint.family
    parts = (*family.components, *family.tokenizers.values(), "scheduler")
    if unnamed := [part for part in parts if not _is_class(checkpoint.index.get(part))]:
        raise InputError(f"{folder}/model_index.json names no class of {' or '.join(LIBRARIES)} as {unnamed[0]}")
    missing = [c for c in family.components if not (checkpoint.part(c) / "config.json").is_file()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(f'{c}/config.json' for c in missing)}")
    try:
        problems = family.check(checkpoint.configs)
    except KeyError as error:
        raise InputError(f"{folder} is not supported: a config.json in it lacks the key {error}") from None
    if problems:
        raise InputError(f"{folder} is not supported: " + "; ".join(problems))


def open_folder(folder: Path, variant: str | None, vae: Path | None = None) -> Checkpoint:
    """A checked checkpoint; InputError where something of it is missing, damaged or not supported."""
    checkpoint = Checkpoint(folder, variant, vae)
    check_configs(checkpoint)
    family = checkpoint.family
    parts = {c: checkpoint.part(c) for c in family.components}
    variants = sorted({v for part in parts.values() for v in _variants(part)})
    if variant is None and len(variants) == 1 and not any(_found(p, None) for p in parts.values() if p != vae):
        checkpoint = Checkpoint(folder, variants[0], vae)  # an fp16-only folder is recognised by itself
    if variant is not None and variant not in variants:
        raise InputError(f"{folder} has no variant {variant!r}: it has {', '.join(variants) or 'none'}")
    for component in family.components:
        for path in checkpoint.weights[component]:
            _values(path)
    return checkpoint


def _is_class(entry: Any) -> bool:
    """Whether an entry of model_index.json is [library, class] of a library that may be imported."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES and isinstance(entry[1], str)


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
            return _shards(index)
    return ()


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise InputError(f"{index} should map every weight to the name of a file beside it")
    return tuple(index.parent / name for name in sorted(set(names.values())))


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
        return sum(math.prod(t["shape"]) for t in header.values())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download the checkpoint again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError where the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} cannot be read: a JSON object was expected")
    return value
