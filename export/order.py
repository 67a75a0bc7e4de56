"""What an export is asked for, checked in one place for the command line and for Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.export import asked
from turbochain.export.families import Family, Shape, common
from turbochain.export.run import Run
from turbochain.export.sources import Source, find, is_elsewhere, original
from turbochain.export.sources.checkpoint import files_read, part_files_read, settled_variant
from turbochain.export.sources.digests import Digests
from turbochain.export.sources.parts import TINY
from turbochain.export.sources.presets import PRESETS
from turbochain.runtime.errors import InputError

PRECISIONS = ("fp32", "fp16")
VAE_PRECISIONS = ("fp32", "bf16")
LOCAL = "a folder"
"""The source in a recipe for a local folder or file, which its files identify, and not its name."""


@dataclass(frozen=True)
class ExportOrder:
    """What bundle to make; InputError lists every value that cannot be. None: the default."""

    source: str  # a hub id, a folder in diffusers' format, a .safetensors file, "demo", "synthetic:NAME"
    precision: str | None = None  # fp32 or fp16
    vae_precision: str | None = None  # fp32 or bf16, for the VAE instead
    vae: str | None = None  # "tiny", a hub id or a folder: this VAE instead of the checkpoint's own
    size: tuple[int, int] | None = None  # width, height in pixels, multiples of 8
    batch: int | None = None  # pictures per pass
    steps: tuple[int, ...] | None = None  # step counts, 1 to 50
    opset: int | None = None  # of the ONNX graphs, 18 to 23
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"
    config: str | None = None  # of a source that is a file: a preset's name, or a folder with its JSON files
    unet: str | None = None  # a safetensors file, a hub id, a file of one, or a folder: this UNet instead
    scheduler: dict[str, Any] | None = None  # changes of the scheduler's config; `_class_name`: another class
    timesteps: tuple[int, ...] | None = None  # explicit ones, descending, instead of steps
    lora: tuple[str, ...] | None = None  # NAME or NAME:SCALE, fused in this order; names as of a UNet
    eta: float | None = None  # 0 to 1, of the schedulers that have one
    recipe_name: str | None = None  # of a recipe that was settled with, see `recipes.settle`

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
        problems += asked.schedule_problems(self.steps, self.timesteps, self.eta)
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
        return {f"lora-{i}" if i > 1 else "lora": asked.scaled(text) for i, text in enumerate(self.lora or (), 1)}

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
            **{"config": None if self.config is None else _told_config(self.config)},
            **{"scheduler": self.scheduler, "timesteps": self.timesteps, "lora": loras or None, "eta": self.eta},
            **{"recipe": self.recipe_name},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def part_files(self) -> dict[str, Path]:
        """Return what an export reads of the parts that lie here: name in the checkpoint → file."""
        places = {component: source.local for component, source in self.sources.items() if component and source.local}
        folders = {component: place for component, place in places.items() if place.is_dir()}
        if folder := next((place for key, place in folders.items() if key in self.loras), None):
            raise InputError(f"--lora {folder} is a folder, and a .safetensors file was expected: name the one in it")
        return {f"{c}.safetensors": place for c, place in places.items() if c not in folders} | {
            f"{component}/{path.name}": path
            for component, folder in folders.items()
            for path in part_files_read(folder, settled_variant([folder], self.variant))
        }

    def settled_config(self) -> str | None:
        """Return the configuration of a source that is a file, as given or as guessed; None for other sources.

        Raises InputError if one is given for another source, or none for a file that does not tell it.
        """
        local = find(self.source).local
        if local is not None and local.is_file():
            return original.settled(local, self.config)[0]
        if self.config is not None:
            raise InputError(
                f"--config {self.config} is for a checkpoint in one file, and {self.source} has its own configuration: "
                "leave --config out"
            )
        return None

    def files(self) -> dict[str, Path]:
        """Return what an export reads of all sources that lie here: name in the checkpoint → file.

        Licences and model cards do not count. Raises InputError if a source is of no kind, or lacks files.
        """
        folder, parts, config = find(self.source).local, self.part_files(), self.settled_config()
        if folder and config:
            return original.files_read(folder, config) | parts
        own = files_read(folder, self.variant, self.parts) if folder else []
        for component, name in self.parts.items() if folder else ():
            # The tiny VAE has to decode this checkpoint's latents, and a file has no config of its own.
            if name == TINY or name.endswith(".safetensors"):
                own.append(folder / component / "config.json")
        return {str(path.relative_to(folder)): path for path in own if folder} | parts

    def recipe(self, precision: str, digests: Digests | None = None) -> "Recipe":
        """Return the order with every default, `precision` among them.

        `digests`: what is known of the files already. Raises InputError as `files`.
        """
        known = digests or Digests()
        files = {name: known.record(path).sha256 for name, path in self.files().items()}
        config = self.settled_config()
        settled = self.given() | ({} if config is None else {"config": _told_config(config)})
        return Recipe(_told(find(self.source)), files, **{"precision": precision, **settled})


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made from and for, as the bundle tells it: `request` in bundle.json."""

    source: str  # its name, or LOCAL
    files: dict[str, str]  # what is read of the sources that lie here: name in the checkpoint → digest
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
    config: str | None = None  # of a source that is a file: a preset's name, or LOCAL
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
    return LOCAL if source.local else source.name


def _told_config(config: str) -> str:
    return config if config in PRESETS else LOCAL
