"""What an export is asked for, checked in one place for the command line and for Python."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from turbochain.export import recipes
from turbochain.export.families import Family, Shape, common
from turbochain.export.run import Run
from turbochain.export.sources import Source, find, is_elsewhere
from turbochain.export.sources.checkpoint import files_read, part_files_read, settled_variant
from turbochain.export.sources.digests import Digests
from turbochain.export.sources.parts import CLASSES, TINY, config_beside
from turbochain.runtime.errors import InputError

PRECISIONS = ("fp32", "fp16")
VAE_PRECISIONS = ("fp32", "bf16")
LOCAL, LOCAL_FILE = "a folder", "a file"
"""The source in a recipe for a local folder or file, which its digests identify, and not its name."""


@dataclass(frozen=True)
class ExportOrder:
    """What bundle to make; InputError lists every value that cannot be. None: the default."""

    source: str  # a hub id, a folder in diffusers' format, "demo", "synthetic:NAME"
    precision: str | None = None  # fp32 or fp16
    vae_precision: str | None = None  # fp32 or bf16, for the VAE instead
    vae: str | None = None  # "tiny", a hub id or a folder: this VAE instead of the checkpoint's own
    size: tuple[int, int] | None = None  # width, height in pixels, multiples of 8
    batch: int | None = None  # pictures per pass
    steps: tuple[int, ...] | None = None  # step counts, 1 to 50
    opset: int | None = None  # of the ONNX graphs, 18 to 23
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"
    unet: str | None = None  # a safetensors file, a hub id, a file of one, or a folder: this UNet instead
    scheduler: dict[str, Any] | None = None  # changes of the scheduler's config; `_class_name`: another class
    timesteps: tuple[int, ...] | None = None  # explicit ones, descending, instead of steps
    lora: tuple[str, ...] | None = None  # NAME or NAME:SCALE, fused in this order; names as of a UNet
    eta: float | None = None  # 0 to 1, of the schedulers that have one
    recipe_name: str | None = None  # fills what is left open, see `settle`

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in (None, *PRECISIONS):
            problems.append(f"precision {self.precision!r}: choose {' or '.join(PRECISIONS)}")
        if self.vae_precision not in (None, *VAE_PRECISIONS):
            problems.append(f"precision {self.vae_precision!r} of the VAE: choose {' or '.join(VAE_PRECISIONS)}")
        if self.size is not None and (min(self.size) < 8 or any(side % 8 for side in self.size)):
            width, height = self.size
            problems.append(f"size {width}x{height}: width and height must be multiples of 8 pixels")
        if self.batch is not None and self.batch < 1:
            problems.append(f"batch {self.batch}: at least 1 was expected")
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or max(self.steps) > 50):
            problems.append(f"steps {list(self.steps)}: counts from 1 to 50 were expected, such as 1-4 or 1,2,4")
        if self.opset is not None and not 18 <= self.opset <= 23:
            problems.append(f"opset {self.opset}: 18 to 23 was expected")
        problems += _schedule_problems(self)
        if problems:
            raise InputError("; ".join(problems))

    @property
    def parts(self) -> dict[str, str]:
        """Return component → the name of the part that replaces the checkpoint's own."""
        given = {"vae": self.vae, "unet": self.unet}
        return {component: name for component, name in given.items() if name is not None}

    @property
    def loras(self) -> dict[str, tuple[str, float]]:
        """Return lora, lora-2, … → the name and the scale of a LoRA; InputError if a scale is not a finite number."""
        return {f"lora-{i}" if i > 1 else "lora": _scaled(text) for i, text in enumerate(self.lora or (), 1)}

    @property
    def sources(self) -> dict[str, Source]:
        """Return where parts are read from: "" → the checkpoint's source, component → that of what replaces its own.

        LoRAs are lora, lora-2, …. The tiny VAE's source is not here: the checkpoint decides it. InputError if a name is
        of no kind.
        """
        parts = {c: find(name, c) for c, name in self.parts.items() if name != TINY}
        return {"": find(self.source)} | parts | {key: find(name, "lora") for key, (name, _) in self.loras.items()}

    @property
    def online(self) -> bool:
        """Return whether the network is asked: for what a hub id names, or for the family's tiny VAE."""
        if TINY in self.parts.values() and find(self.source).tiny_vae is None:
            return True
        named = [(name, c) for c, name in self.parts.items() if name != TINY]
        named += [(name, "lora") for name, _ in self.loras.values()]
        return is_elsewhere(self.source) or any(is_elsewhere(name, c) for name, c in named)

    def given(self) -> dict[str, Any]:
        """Return the fields of the recipe that were asked for explicitly."""
        told = {c: name if name == TINY else _told(find(name, c)) for c, name in self.parts.items()}
        loras = tuple(f"{_told(find(name, 'lora'))}:{scale:g}" for name, scale in self.loras.values())
        width, height = self.size or (None, None)
        steps = (len(self.timesteps),) if self.timesteps else self.steps
        fields = {
            **{"revision": self.revision, "variant": self.variant, "height": height, "width": width},
            **{"batch": self.batch, "steps": None if steps is None else tuple(sorted(set(steps)))},
            **{"opset": self.opset, "precision": self.precision, "vae_precision": self.vae_precision, **told},
            **{"scheduler": self.scheduler, "timesteps": self.timesteps, "lora": loras or None, "eta": self.eta},
            **{"recipe": self.recipe_name},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def part_files(self) -> dict[str, Path]:
        """Return what an export reads of the parts that are here: name in the checkpoint → file.

        A part that is a file is named after the component, such as unet.safetensors.
        """
        found: dict[str, Path] = {}
        for component, source in self.sources.items():
            place = source.local
            if not component or not place:
                continue
            if component in self.loras and place.is_dir():
                raise InputError(
                    f"--lora {place} is a folder, and a .safetensors file was expected: name the file in it"
                )
            variant = settled_variant([place], self.variant)
            for path in part_files_read(place, variant):
                found[f"{component}/{path.name}" if place.is_dir() else f"{component}{path.suffix}"] = path
            if place.is_file() and component in CLASSES and config_beside(place, component):
                found[f"{component}.json"] = place.with_name("config.json")
        return found

    def files(self) -> dict[str, Path]:
        """Return what an export reads of all sources that are folders here: name in the checkpoint → file.

        Licences and model cards do not count. Raises InputError if a source is of no kind, or lacks files.
        """
        folder, parts = find(self.source).local, self.part_files()
        own = files_read(folder, self.variant, self.parts) if folder else []
        for component, name in self.parts.items() if folder else ():
            # The tiny VAE has to decode this checkpoint's latents, and a file has no config of its own.
            if (name == TINY or name.endswith(".safetensors")) and f"{component}.json" not in parts:
                own.append(folder / component / "config.json")
        return {str(path.relative_to(folder)): path for path in own if folder} | parts

    def recipe(self, precision: str, digests: Digests | None = None) -> "Recipe":
        """Return the order with every default, `precision` among them.

        `digests`: what is known of the files already. Raises InputError as `files`.
        """
        known = digests or Digests()
        files = {name: known.record(path).sha256 for name, path in self.files().items()}
        return Recipe(_told(find(self.source)), files, **{"precision": precision, **self.given()})


def settle(order: ExportOrder) -> ExportOrder:
    """Return the order with what its recipe says of everything that is left open; options that are given win.

    Steps and timesteps say the same thing, so either leaves out the recipe's. Raises InputError without a source.
    """
    fields = recipes.get(order.recipe_name).fields if order.recipe_name else {}
    if order.steps or order.timesteps:
        fields = {name: value for name, value in fields.items() if name not in ("steps", "timesteps")}
    settled = replace(order, **{name: value for name, value in fields.items() if not getattr(order, name)})
    if not settled.source:
        raise InputError("no source is given: name a checkpoint, or a recipe with --recipe NAME")
    return settled


def deviations(order: ExportOrder) -> list[str]:
    """Return in which fields a settled order differs from its recipe."""
    fields = recipes.get(order.recipe_name).fields if order.recipe_name else {}
    return [name for name, value in fields.items() if getattr(order, name) != value]


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made from and for, as the bundle tells it: `request` in bundle.json."""

    source: str  # its name, or LOCAL
    files: dict[str, str]  # what is read of the sources that are folders here: name in the checkpoint → digest
    precision: str
    revision: str | None = None
    variant: str | None = None
    height: int = 512  # pixels
    width: int = 512
    batch: int = 1
    steps: tuple[int, ...] = (1, 2, 3, 4)
    opset: int = 21
    vae_precision: str | None = None
    vae: str | None = None
    unet: str | None = None
    scheduler: dict[str, Any] | None = None
    timesteps: tuple[int, ...] | None = None
    lora: tuple[str, ...] = ()
    eta: float | None = None
    recipe: str | None = None

    @property
    def shape(self) -> Shape:
        """Return what the graphs are made for."""
        return Shape(self.height, self.width, self.batch)

    @property
    def runs(self) -> list[Run]:
        """Return how text-to-image calls the scheduler for each step count."""
        return [Run(steps, timesteps=self.timesteps, eta=self.eta or 0.0) for steps in self.steps]

    @property
    def call(self) -> dict[str, Any]:
        """Return the further arguments of diffusers' pipeline: explicit timesteps and eta, if they were asked for."""
        given = {"timesteps": self.timesteps and list(self.timesteps), "eta": self.eta}
        return {name: value for name, value in given.items() if value is not None}

    def precisions(self, family: Family) -> dict[str, str]:
        """Return graph → the precision that was asked for."""
        return common.precisions(family, self.precision, self.vae_precision)


@dataclass(frozen=True)
class How:
    """Where a bundle is made, and what is said meanwhile."""

    output: Path  # the bundle
    force: bool = False  # build even if memory or disk look too small
    quiet: bool = False  # print no phases
    verbose: bool = False  # show what the exporter and the libraries print


def _told(source: Source) -> str:
    if source.local is None:
        return source.name
    return LOCAL_FILE if source.local.is_file() else LOCAL


def scheduler_changes(value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the changes of a scheduler's config that a class name, a JSON object or a mapping says; None for None.

    The key `_class_name` names another class, as it does in scheduler_config.json. Raises InputError for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value):
        return {"_class_name": value}
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value)
    except ValueError:
        found = None
    if not found or not isinstance(found, dict) or not isinstance(found.get("_class_name", ""), str):
        raise InputError(
            f"--scheduler {value}: a class of diffusers, such as DDIMScheduler, or a JSON object of changes to its "
            """config was expected, such as '{"timestep_spacing": "trailing"}'; for both, name the class in it as """
            '"_class_name"'
        )
    return found


def _schedule_problems(order: ExportOrder) -> list[str]:
    """Return what is wrong with an order's timesteps, eta, LoRAs and recipe, as phrases."""
    problems, timesteps = [], order.timesteps
    if timesteps is not None:
        descends = all(a > b for a, b in pairwise(timesteps))
        if not 1 <= len(timesteps) <= 50 or min(timesteps) < 0 or not descends:
            problems.append(
                f"timesteps {list(timesteps)}: 1 to 50 descending numbers from 0 were expected, such as 999,749,499,249"
            )
        elif order.steps is not None and set(order.steps) != {len(timesteps)}:
            problems.append(
                f"steps {list(order.steps)}: {len(timesteps)} timesteps are given, which are {len(timesteps)} steps; "
                "leave steps out"
            )
    if order.eta is not None and not 0 <= order.eta <= 1:
        problems.append(f"eta {order.eta}: a number from 0 to 1 was expected")
    if order.recipe_name is not None:
        recipes.get(order.recipe_name)
    return problems


def _scaled(text: str) -> tuple[str, float]:
    """Return the name and the scale that NAME or NAME:SCALE says."""
    name, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        found = float(scale)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"--lora {text}: a number was expected after the colon, such as {name}:0.8")
    return name, found
