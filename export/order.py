"""What an export is asked for, checked in one place for the command line and for Python."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.export import tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Family, Shape
from turbochain.export.sources import Source, find, is_elsewhere
from turbochain.export.sources.checkpoint import files_read, part_files_read, settled_variant
from turbochain.export.sources.digests import Digests
from turbochain.export.sources.parts import TINY
from turbochain.export.tasks import Task
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from turbochain.runtime.errors import InputError

PRECISIONS = ("fp32", "fp16")
VAE_PRECISIONS = ("fp32", "bf16")
LOCAL = "a folder"
"""The source in a recipe for a local folder, which its files identify, and not its name."""


@dataclass(frozen=True)
class ExportOrder:
    """What bundle to make; InputError lists every value that cannot be. None: the default."""

    source: str  # a hub id, a folder in diffusers' format, "demo", "synthetic:NAME"
    precision: str | None = None  # fp32 or fp16
    vae_precision: str | None = None  # fp32 or bf16, for the VAE instead
    vae: str | None = None  # "tiny", a hub id or a folder: this VAE instead of the checkpoint's own
    sizes: tuple[tuple[int, int], ...] | None = (
        None  # width, height in pixels, multiples of 8; the first is the default
    )
    batches: tuple[int, ...] | None = None  # pictures per pass
    steps: tuple[int, ...] | None = None  # step counts, 1 to 50
    opset: int | None = None  # of the ONNX graphs, 18 to 23
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"
    tasks: tuple[str, ...] | None = None  # text-to-image, image-to-image, inpainting
    guidance_scale: float | None = None  # of a call that gives none

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in (None, *PRECISIONS):
            problems.append(f"precision {self.precision!r}: choose {' or '.join(PRECISIONS)}")
        if self.vae_precision not in (None, *VAE_PRECISIONS):
            problems.append(f"precision {self.vae_precision!r} of the VAE: choose {' or '.join(VAE_PRECISIONS)}")
        for width, height in self.sizes or ():
            if min(width, height) < 8 or width % 8 or height % 8:
                problems.append(f"size {width}x{height}: width and height must be multiples of 8 pixels")
        problems += [f"batch {batch}: at least 1 was expected" for batch in self.batches or () if batch < 1]
        for name, values in (("size", self.sizes), ("batch", self.batches), ("tasks", self.tasks)):
            if values == ():
                problems.append(f"{name}: at least one was expected")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            problems.append(f"guidance scale {self.guidance_scale}: a number of at least 0 was expected")
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or max(self.steps) > 50):
            problems.append(f"steps {list(self.steps)}: counts from 1 to 50 were expected, such as 1-4 or 1,2,4")
        if self.opset is not None and not 18 <= self.opset <= 23:
            problems.append(f"opset {self.opset}: 18 to 23 was expected")
        if problems:
            raise InputError("; ".join(problems))
        tasks.find(self.tasks or ())

    @property
    def parts(self) -> dict[str, str]:
        """Return component → the name of the part that replaces the checkpoint's own."""
        given = {"vae": self.vae}
        return {component: name for component, name in given.items() if name is not None}

    @property
    def sources(self) -> dict[str, Source]:
        """Return where parts are read from: "" → the checkpoint's source, component → that of what replaces its own.

        The tiny VAE's source is not here: the checkpoint decides it. InputError if a name is of no kind.
        """
        return {"": find(self.source)} | {c: find(name, c) for c, name in self.parts.items() if name != TINY}

    @property
    def online(self) -> bool:
        """Return whether the network is asked: for what a hub id names, or for the family's tiny VAE."""
        if TINY in self.parts.values() and find(self.source).tiny_vae is None:
            return True
        named = [(name, c) for c, name in self.parts.items() if name != TINY]
        return is_elsewhere(self.source) or any(is_elsewhere(name, c) for name, c in named)

    def given(self) -> dict[str, Any]:
        """Return the fields of the recipe that were asked for explicitly."""
        told = {c: name if name == TINY else _told(find(name, c)) for c, name in self.parts.items()}
        fields = {
            **{"revision": self.revision, "variant": self.variant},
            **{"sizes": _once(self.sizes), "batches": _once(self.batches), "tasks": _once(self.tasks)},
            **{"steps": None if self.steps is None else tuple(sorted(set(self.steps)))},
            **{"opset": self.opset, "precision": self.precision, "vae_precision": self.vae_precision, **told},
            **{"guidance_scale": self.guidance_scale},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def part_files(self) -> dict[str, Path]:
        """Return what an export reads of the parts that are folders here: name in the checkpoint → file."""
        folders = {component: source.local for component, source in self.sources.items() if component and source.local}
        return {
            f"{component}/{path.name}": path
            for component, folder in folders.items()
            for path in part_files_read(folder, settled_variant([folder], self.variant))
        }

    def files(self) -> dict[str, Path]:
        """Return what an export reads of all sources that are folders here: name in the checkpoint → file.

        Licences and model cards do not count. Raises InputError if a source is of no kind, or lacks files.
        """
        folder, parts = find(self.source).local, self.part_files()
        own = files_read(folder, self.variant, self.parts) if folder else []
        if folder and self.vae == TINY:  # whether it decodes this checkpoint's latents
            own.append(folder / "vae" / "config.json")
        return {str(path.relative_to(folder)): path for path in own if folder} | parts

    def recipe(self, precision: str, digests: Digests | None = None) -> "Recipe":
        """Return the order with every default, `precision` among them.

        `digests`: what is known of the files already. Raises InputError as `files`.
        """
        known = digests or Digests()
        files = {name: known.record(path).sha256 for name, path in self.files().items()}
        return Recipe(_told(find(self.source)), files, **{"precision": precision, **self.given()})


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made from and for, as the bundle tells it: `request` in bundle.json."""

    source: str  # its name, or LOCAL
    files: dict[str, str]  # what is read of the sources that are folders here: name in the checkpoint → digest
    precision: str
    revision: str | None = None
    variant: str | None = None
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)  # width, height in pixels
    batches: tuple[int, ...] = (1,)
    tasks: tuple[str, ...] = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE)
    guidance_scale: float = 0.0
    steps: tuple[int, ...] = (1, 2, 3, 4)
    opset: int = 21
    vae_precision: str | None = None
    vae: str | None = None

    def find_tasks(self) -> list[Task]:
        """Return the tasks."""
        return tasks.find(self.tasks)

    def layout(self, family: Family, configs: Mapping[str, Any], K: int = 1, zeros: bool = False) -> Layout:
        """Return what decides the chains and graphs; K and `zeros` as in `Shape` and `Layout`."""
        shapes = [Shape(height, width, batch, K) for width, height in self.sizes for batch in self.batches]
        return Layout(family, configs, self.find_tasks(), shapes, zeros)


@dataclass(frozen=True)
class How:
    """Where a bundle is made, and what is said meanwhile."""

    output: Path  # the bundle
    force: bool = False  # build even if memory or disk look too small
    quiet: bool = False  # print no phases
    verbose: bool = False  # show what the exporter and the libraries print


def _told(source: Source) -> str:
    return LOCAL if source.local else source.name


def _once(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Return the values without repetitions, in their order."""
    return None if values is None else tuple(dict.fromkeys(values))


def sizes_of(size: tuple[int, int] | Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...] | None:
    """Return the sizes of an order, of one size or several."""
    if size is None:
        return None
    one = len(size) == 2 and all(isinstance(side, int) for side in size)
    return tuple((width, height) for width, height in ((size,) if one else size))  # type: ignore[misc]


def batches_of(batch: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the batches of an order, of one or several."""
    return None if batch is None else (batch,) if isinstance(batch, int) else tuple(batch)
