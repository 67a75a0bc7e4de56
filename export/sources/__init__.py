"""Where checkpoints and their parts come from: `find(name)`.

Each kind of source is a module of `kinds`, discovered automatically, with one constant `KIND`; to add a kind, add a
file. Nothing here imports torch: a source is found before the work starts, and fetched within it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from turbochain.runtime.errors import InputError

BY_SPELLING, ON_DISK, ELSEWHERE = range(3)
"""The ranks of kinds: a name is tried by its spelling alone first, then as a path, then as something far away."""

LORA = "lora"
"""The part that is no component: a LoRA, whose folder has only `model.safetensors`."""


def _no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def _no_check(folder: Path, counts: dict[str, int], coming: int) -> None:
    """Accept everything."""


@dataclass(frozen=True)
class Want:
    """What is to be fetched from a source, and what to call meanwhile."""

    root: Path  # the folder for what has to be written and has no place of its own on this disk
    part: str | None = None  # this alone, such as "vae", or "lora", "lora-2", …; None: a whole checkpoint
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"
    skip: tuple[str, ...] = ()  # components whose weights are not needed
    config: str | None = None  # of a checkpoint in one file: a preset's name, or a folder with its JSON files
    part_config: Mapping[str, Any] | None = None  # of a part in one file: config.json of what it replaces
    progress: Callable[[int, int], None] = _no_progress  # (done, total), in bytes or values
    before_weights: Callable[[Path, dict[str, int], int], None] = _no_check
    # (folder with all but the weights, component → values in its weights, bytes to come), called before weights are
    # downloaded or drawn; it may raise


@dataclass(frozen=True)
class Fetched:
    """What lies on this disk now."""

    folder: Path
    commit: str | None = None  # of a hub repository
    variant: str | None = None  # as in Want, if this source has variants
    home: Path | None = None  # the folder with the licence and model card, if it is another


class Source(Protocol):
    """A place that a checkpoint, or one part of one, is fetched from."""

    @property
    def name(self) -> str:
        """Return the name as the bundle tells it: a hub id, a folder's name without its path, …."""

    @property
    def local(self) -> Path | None:
        """Return the local folder or file, which may change at any time; None if name and revision identify it."""

    @property
    def tiny_vae(self) -> "Source | None":
        """Return the source of the tiny VAE that belongs to this checkpoint; None: the family's."""

    def fetch(self, want: Want) -> Fetched:
        """Bring what is wanted onto this disk; raises InputError, and what `want.before_weights` raises."""


@dataclass(frozen=True)
class SourceKind:
    """One kind of source."""

    form: str  # what names of this kind look like, for messages
    rank: int  # BY_SPELLING, ON_DISK or ELSEWHERE
    find: Callable[[str], Source | None]  # None: the name is not of this kind
    parts: bool  # whether a single part may be named so
    wholes: bool = True  # whether a whole checkpoint may be named so
    variants: bool = False  # whether its weights may be of a variant, such as "fp16"


def written_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`, written under another name first if it is not there, so that it is never half there."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        write(partial)
        partial.rename(folder)
    return folder


def known() -> list[SourceKind]:
    """Return every kind of source, in the order in which a name is tried."""
    from turbochain.export.sources import kinds

    modules = [importlib.import_module(f"{kinds.__name__}.{m.name}") for m in pkgutil.iter_modules(kinds.__path__)]
    return sorted((m.KIND for m in modules), key=lambda kind: (kind.rank, kind.form))


def find(name: str, part: str | None = None) -> Source:
    """Return the source `name` of a checkpoint or a part, such as "vae"; InputError if it is of no kind."""
    return _find(name, part)[1]


def is_elsewhere(name: str, part: str | None = None) -> bool:
    """Return whether the network is asked for the source `name`; InputError if it is of no kind."""
    return _find(name, part)[0].rank == ELSEWHERE


def has_variants(name: str, part: str | None = None) -> bool:
    """Return whether the weights of the source `name` may be of a variant; InputError if it is of no kind."""
    return _find(name, part)[0].variants


def _find(name: str, part: str | None) -> tuple[SourceKind, Source]:
    possible = [kind for kind in known() if (kind.wholes if part is None else kind.parts)]
    for kind in possible:
        if found := kind.find(name):
            return kind, found
    forms = ", nor ".join([*(["tiny"] if part == "vae" else []), *sorted(kind.form for kind in possible if kind.form)])
    raise InputError(f"{name} is neither {forms}" if part is None else f"--{part} {name} is neither {forms}")
