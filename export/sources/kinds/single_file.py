"""A .safetensors file here: a whole checkpoint in the original names, or one part of one."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from turbochain.export.sources import LORA, ON_DISK, Fetched, Source, SourceKind, Want, written_once
from turbochain.export.sources import original as originals
from turbochain.export.sources.weight_files import STEMS

log = logging.getLogger("turbochain")


@dataclass(frozen=True)
class SingleFile:
    """A file; a bundle tells its name and not its path."""

    path: Path

    @property
    def name(self) -> str:
        """Return the file's own name."""
        return self.path.name

    @property
    def local(self) -> Path:
        """Return the file."""
        return self.path

    @property
    def tiny_vae(self) -> None:
        """Return None: the family's serves."""

    def fetch(self, want: Want) -> Fetched:
        """Convert what is wanted into a folder in diffusers' format in `want.root`, unless it is there.

        A LoRA is copied as it is. EMA weights beside the others are not used. Raises InputError if it is no such file,
        or has another configuration than the one that is wanted.
        """
        part = want.part
        if part is not None and part.startswith(LORA):
            originals.read_any(self.path)  # refuses what is damaged
            return Fetched(written_once(want.root / f"{self.path.stem}-{part}", self._copy))
        from turbochain.export.sources import conversion

        original = originals.read(self.path)
        if part is not None:
            folder = want.root / f"{self.path.stem}-{part}"
            return Fetched(written_once(folder, lambda to: conversion.write_part(original, part, want.part_config, to)))
        config, is_guess = originals.settled(self.path, want.config)
        if is_guess:
            log.warning(
                "%s: --config %s is assumed, by the shapes of its tensors; they do not tell the scheduler, nor whether "
                "it is a Turbo: if it is another, name it with --config (%s)",
                *(self.name, config, ", ".join(originals.CONFIGS)),
            )
        if original.has("model_ema."):
            log.warning("%s: its EMA weights are not used, but those beside them, as in diffusers", self.name)
        folder = want.root / f"{self.path.stem}-checkpoint"
        return Fetched(written_once(folder, lambda to: conversion.write_checkpoint(original, config, to, want)))

    def _copy(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        shutil.copyfile(self.path, folder / f"{STEMS[1]}.safetensors")


def _find(name: str) -> Source | None:
    path = Path(name)
    if not path.is_file():
        return None
    originals.refuse_others(path)
    return SingleFile(path.absolute())  # in the hub's cache a file is a link to one without a name


KIND = SourceKind("a .safetensors file here", ON_DISK, _find, parts=True)
