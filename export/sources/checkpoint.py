"""A checkpoint on this disk, and what can be known about it without torch.

Whatever its source, it ends as a `Checkpoint` whose files have been looked at before any are loaded.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from turbochain.export import families
from turbochain.export.families import Family
from turbochain.export.sources.weight_files import (
    part_files,
    read_json,
    refuse_pointers,
    settled_variant,
    values_in,
    variants_of,
    weight_files,
)
from turbochain.runtime.errors import InputError

LIBRARIES = ("diffusers", "transformers")  # model_index.json can name any module; no other is imported
TERMS = ("LICENSE*", "LICENCE*", "README.md")  # licence and model card
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
"""What transformers may read of a tokenizer's folder."""


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: a component, a tokenizer or the scheduler, and where it came from."""

    folder: Path  # config.json, and the weights if it has any
    home: Path  # the folder whose model card and licence are for it
    source: str  # as the bundle tells it
    revision: str | None = None  # commit of a hub repository
    variant: str | None = None  # "fp16": weights are model.fp16.safetensors, or plain if there are none of the variant

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """Return its safetensors files, several if it is sharded; InputError if there are none."""
        return weight_files(self.folder, self.variant)

    @property
    def own_variant(self) -> str | None:
        """Return the variant, if its files are of that variant (some hub folders have it for some parts only)."""
        return self.variant if any(f".{self.variant}" in path.name for path in self.weights) else None

    @property
    def license(self) -> str | None:
        """Return the licence that the model card's front matter names."""
        return license_of(self.home)

    @property
    def terms(self) -> list[Path]:
        """Return the files of its licence and its model card."""
        return sorted({p for pattern in TERMS for p in self.home.glob(pattern) if p.is_file()})

    def parameters(self) -> int:
        """Return the number of values in its weight files, read from their headers."""
        return sum(values_in(path) for path in self.weights)


@dataclass(frozen=True)
class Checkpoint:
    """A folder in diffusers' format, of a supported family, and the parts that replace its own."""

    folder: Path
    variant: str | None = None  # of its own weights, such as "fp16"
    source: str = ""  # as the bundle tells it
    revision: str | None = None  # commit of a hub repository
    replaced: dict[str, Part] = field(default_factory=dict)  # component → another part than its own
    loras: dict[str, Part] = field(default_factory=dict)  # lora, lora-2, … → its file
    adapters: tuple[tuple[Path, float], ...] = ()  # LoRA files to fuse into the weights, and how strongly (1: fully)
    references: tuple[tuple[Path, float], ...] = ()  # LoRA files to record cases with, and how strongly
    scheduler: dict[str, Any] = field(default_factory=dict)  # changes of its config; `_class_name`: the class
    controls: dict[str, Part] = field(default_factory=dict)  # controlnet-NAME, … → a ControlNet or T2I-Adapter

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return model_index.json, as it would be with the parts that replace its own."""
        path = self.folder / "model_index.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder} has no model_index.json, so it is not a checkpoint in diffusers' format; of a "
                "checkpoint in one file, give the path of the .safetensors file"
            )
        others = (self.replaced | self.controls).items()
        classes = {c: read_json(part.folder / "config.json").get("_class_name") for c, part in others}
        return read_json(path) | {c: ["diffusers", name] for c, name in classes.items()}

    @property
    def family(self) -> Family:
        """Return the family of its pipeline class; InputError if that is not supported."""
        return families.of(str(self.index.get("_class_name")))

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Return every component with weights, then every tokenizer, then the scheduler, then every LoRA, then every
        ControlNet and T2I-Adapter."""
        names = (*self.family.components, *self.family.tokenizers.values(), "scheduler")
        own = {n: Part(self.folder / n, self.folder, self.source, self.revision, self.variant) for n in names}
        if self.scheduler:
            changed = f"{self.source}, changed to {json.dumps(self.scheduler)}"
            own["scheduler"] = replace(own["scheduler"], source=changed)
        return own | self.replaced | self.loras | self.controls

    @property
    def components(self) -> tuple[str, ...]:
        """Return every component with weights."""
        return (*self.family.components, *self.controls)

    @cached_property
    def configs(self) -> dict[str, Any]:
        """Return config.json of every component with weights."""
        return {c: read_json(self.parts[c].folder / "config.json") for c in self.components}

    @cached_property
    def weights(self) -> dict[str, tuple[Path, ...]]:
        """Return component → its safetensors files."""
        return {c: self.parts[c].weights for c in self.components}

    def parameters(self, component: str) -> int:
        """Return the number of values in a component's weight files."""
        return self.parts[component].parameters()


def license_of(folder: Path) -> str | None:
    """Return the licence that the front matter of the folder's model card names."""
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.S) if card.is_file() else None
    found = dict(re.findall(r"^(license(?:_name)?): *['\"]?([^'\"\n]+)", front[1], re.M)) if front else {}
    return found.get("license_name") or found.get("license")


def check_configs(checkpoint: Checkpoint) -> None:
    """Raise InputError if the classes and configs, without the weights, are not of a supported family."""
    folder, family = checkpoint.folder, checkpoint.family
    if unnamed := [part for part in checkpoint.parts if not _is_class(checkpoint.index.get(part))]:
        raise InputError(f"{folder}/model_index.json names no class of {' or '.join(LIBRARIES)} as {unnamed[0]}")
    _require_configs(folder, {c: checkpoint.parts[c].folder for c in family.components})
    try:
        problems = family.check(checkpoint.configs)
    except KeyError as error:
        raise InputError(f"{folder} is not supported: a config.json in it lacks the key {error}") from None
    if problems:
        raise InputError(f"{folder} is not supported: " + "; ".join(problems))


def _require_configs(folder: Path, components: Mapping[str, Path]) -> list[Path]:
    """Return the config.json of components; InputError if one is missing."""
    found = {c: path / "config.json" for c, path in components.items()}
    if missing := [f"{c}/config.json" for c, path in found.items() if not path.is_file()]:
        raise InputError(f"{folder} lacks {', '.join(missing)}")
    return list(found.values())


def open_folder(
    folder: Path,
    variant: str | None = None,
    source: str | None = None,
    revision: str | None = None,
    replaced: Mapping[str, Part] | None = None,
    controls: Mapping[str, Part] | None = None,
) -> Checkpoint:
    """Return a checked checkpoint; InputError if something of it is missing, damaged or not supported.

    `source`: its name as the bundle tells it (default: the folder's). `replaced`: parts that replace its own.
    `controls`: ControlNets and T2I-Adapters, by the names of their components.
    """
    named = folder.name if source is None else source
    checkpoint = Checkpoint(folder, variant, named, revision, {**(replaced or {})}, controls={**(controls or {})})
    check_configs(checkpoint)
    own = [checkpoint.parts[c].folder for c in checkpoint.family.components if c not in checkpoint.replaced]
    checkpoint = replace(checkpoint, variant=settled_variant(own, variant))
    if variant is not None and variant not in (variants := variants_of(*own)):
        raise InputError(f"{folder} has no variant {variant!r}: it has {', '.join(variants) or 'none'}")
    for path in (path for paths in checkpoint.weights.values() for path in paths):
        values_in(path)
    return checkpoint


def _is_class(entry: Any) -> bool:
    """Return whether an entry of model_index.json is [library, class] of a library that may be imported."""
    return isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES and isinstance(entry[1], str)


def files_read(folder: Path, variant: str | None, without: Collection[str] = ()) -> list[Path]:
    """Return the checkpoint's files that an export reads, but for its licence and model card.

    `without`: components that are read elsewhere. Raises InputError if it is no checkpoint, or weights are missing.
    """
    family = Checkpoint(folder).family
    own = [folder / c for c in family.components if c not in without]
    _require_configs(folder, {path.name: path for path in own})
    variant = settled_variant(own, variant)
    tokenizers = [folder / t / name for t in family.tokenizers.values() for name in TOKENIZER_FILES]
    alone = [folder / "model_index.json", folder / "scheduler" / "scheduler_config.json", *tokenizers]
    found = [p for p in alone if p.is_file()] + [p for part in own for p in part_files(part, variant)]
    refuse_pointers(*found)
    return found


def config_files_read(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's folder but weights and licence; InputError if some are missing."""
    components = Checkpoint(folder).family.components
    return [*files_read(folder, None, components), *_require_configs(folder, {c: folder / c for c in components})]
