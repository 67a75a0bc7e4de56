"""What an export is asked for, checked in one place for the command line and for Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.export import asked, chains, tasks
from turbochain.export.controls import KINDS
from turbochain.export.controls.kind import Control
from turbochain.export.families import Shape
from turbochain.export.options import ExportOptions
from turbochain.export.requested import LOCAL, Requested
from turbochain.export.sources import Source, find, has_variants, is_elsewhere, original
from turbochain.export.sources.checkpoint import files_read
from turbochain.export.sources.digests import Digests
from turbochain.export.sources.parts import TINY
from turbochain.export.sources.presets import PRESETS
from turbochain.export.sources.weight_files import part_files_read, settled_variant
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.numbers import weighted

PRECISIONS = ("fp32", "fp16")
VAE_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class ExportOrder:
    """What bundle to make; InputError lists every value that cannot be. None: the default."""

    source: str  # a hub id, a folder in diffusers' format, a .safetensors file, "demo", "synthetic:NAME"
    precision: str | None = None  # fp32 or fp16
    vae_precision: str | None = None  # fp32 or bf16, for the VAE instead
    vae: str | None = None  # "tiny", a hub id or a folder: this VAE instead of the checkpoint's own
    tasks: tuple[str, ...] | None = None  # text-to-image, image-to-image, inpainting, stream
    sizes: tuple[tuple[int, int], ...] | None = None  # width, height in pixels, multiples of 8
    batches: tuple[int, ...] | None = None  # pictures per pass
    steps: tuple[int, ...] | None = None  # step counts, 1 to 50
    opset: int | None = None  # of the ONNX graphs, 18 to 23
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"
    config: str | None = None  # of a source that is a file: a preset's name, or a folder with its JSON files
    unet: str | None = None  # a safetensors file, a hub id, a file of one, or a folder: this UNet instead
    scheduler: dict[str, Any] | None = None  # changes of the scheduler's config; `_class_name`: another class
    timesteps: tuple[int, ...] | None = None  # explicit ones, descending, instead of steps
    lora: tuple[str, ...] | None = None  # NAME or NAME:SCALE, fused in this order; names as of a UNet
    controlnet: dict[str, str] | None = None  # name in calls → a hub id or a folder
    t2i_adapter: dict[str, str] | None = None  # likewise
    eta: float | None = None  # 0 to 1, of the schedulers that have one
    guidance_scale: float | None = None  # of a call that gives none
    guidance_scales: tuple[float, ...] | None = None  # that a UNet with a guidance embedding gets tables for
    strengths: tuple[float, ...] | None = None  # that LatentConsistencyModelImg2ImgPipeline gets tables for
    clip_skip: int | None = None  # layers of the text encoders that a prompt is drawn without
    stream_batch: int | None = None  # 2 to 4 frames under way in a stream, and the steps that each one makes
    lora_ranks: tuple[int, ...] | None = None  # of slots for LoRAs, 1 to 256; none: there are no slots
    reference_lora: tuple[str, ...] | None = None  # FILE or FILE:SCALE, recorded from diffusers
    recipe_name: str | None = None  # of a recipe that was settled with, see `recipes.settle`

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
        for name in ("tasks", "sizes", "batches", "guidance_scales", "strengths"):
            if getattr(self, name) == ():
                problems.append(f"{name}: at least one was expected")
        problems += asked.call_problems(self.guidance_scale, self.guidance_scales, self.strengths)
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or max(self.steps) > 50):
            problems.append(f"steps {list(self.steps)}: counts from 1 to 50 were expected, such as 1-4 or 1,2,4")
        if self.clip_skip is not None and self.clip_skip < 0:
            problems.append(f"clip_skip {self.clip_skip}: a number of layers from 0 was expected")
        if self.opset is not None and not 18 <= self.opset <= 23:
            problems.append(f"opset {self.opset}: 18 to 23 was expected")
        problems += asked.schedule_problems(self.steps, self.timesteps, self.eta)
        problems += asked.stream_problems(self.stream_batch, self.tasks)
        problems += asked.slot_problems(self.lora_ranks)
        problems += asked.control_problems({kind: getattr(self, kind) for kind in KINDS})
        if problems:
            raise InputError("; ".join(problems))
        tasks.find(self.tasks or ())

    @classmethod
    def of(cls, source: str | None, options: "ExportOptions") -> "ExportOrder":
        """Return the order of `export` and `build`, whose recipe, if it has one, says what is left open."""
        if unknown := sorted(options.keys() - ExportOptions.__annotations__.keys()):
            raise TypeError(f"unknown argument {unknown[0]!r}")
        given = asked.listed(options)
        size, batch, scheduler, rank = (given.pop(n, None) for n in ("size", "batch", "scheduler", "lora_rank"))
        given |= {kind: asked.named(kind, given[kind]) for kind in KINDS if kind in given}
        return cls(
            source or "",
            sizes=None if size is None else _sizes(size),
            batches=(batch,) if isinstance(batch, int) else batch,
            lora_ranks=(rank,) if isinstance(rank, int) else rank,
            scheduler=asked.scheduler_changes(scheduler),
            recipe_name=given.pop("recipe", None),
            **given,
        )

    @property
    def parts(self) -> dict[str, str]:
        """Return component → the name of the part that replaces the checkpoint's own."""
        given = {"vae": self.vae, "unet": self.unet}
        return {component: name for component, name in given.items() if name is not None}

    @property
    def loras(self) -> dict[str, tuple[str, float]]:
        """Return lora, lora-2, … → the name and the scale of a LoRA; InputError if a scale is not a finite number."""
        return {f"lora-{i}" if i > 1 else "lora": weighted("--lora", text) for i, text in enumerate(self.lora or (), 1)}

    @property
    def references(self) -> list[tuple[Path, float]]:
        """Return the LoRA files to record, each with its scale; InputError if there is no such file."""
        found = [weighted("--reference-lora", text) for text in self.reference_lora or ()]
        if missing := [name for name, _ in found if not Path(name).is_file()]:
            raise InputError(
                f"--reference-lora {missing[0]}: a .safetensors file on this disk was expected, and there is none of "
                "that name: check the path, or download it"
            )
        return [(Path(name).absolute(), scale) for name, scale in found]

    @property
    def controls(self) -> dict[Control, str]:
        """Return what steers the UNet → where it is read from."""
        given = ((kind, getattr(self, name) or {}) for name, kind in KINDS.items())
        return {Control(kind, name): place for kind, of_kind in given for name, place in of_kind.items()}

    @property
    def sources(self) -> dict[str, Source]:
        """Return where parts are read from: "" → the checkpoint's source, component → that of what replaces its own.

        LoRAs are lora, lora-2, …, ControlNets controlnet-NAME. The tiny VAE's source is not here: the
        checkpoint decides it. InputError if a name is of no kind.
        """
        parts = {c: find(name, c) for c, name in self.parts.items() if name != TINY}
        controls = {c.component: find(place, c.kind.name.replace("_", "-")) for c, place in self.controls.items()}
        loras = {key: find(name, "lora") for key, (name, _) in self.loras.items()}
        return {"": find(self.source)} | parts | loras | controls

    @property
    def online(self) -> bool:
        """Return whether the network is asked: for what a hub id names, or for the family's tiny VAE."""
        if TINY in self.parts.values() and find(self.source).tiny_vae is None:
            return True
        return any(is_elsewhere(name, part) for name, part in self._named())

    def _named(self) -> list[tuple[str, str | None]]:
        """Return the name of every source but the tiny VAE's, and which part it is; None: the checkpoint."""
        named: list[tuple[str, str | None]] = [(self.source, None)]
        named += [(name, c) for c, name in self.parts.items() if name != TINY]
        named += [(name, "lora") for name, _ in self.loras.values()]
        return named + [(place, control.kind.name.replace("_", "-")) for control, place in self.controls.items()]

    def given(self) -> dict[str, Any]:
        """Return the fields of `Requested` that were asked for explicitly."""
        told = {c: name if name == TINY else _told(find(name, c)) for c, name in self.parts.items()}
        loras = tuple(f"{_told(find(name, 'lora'))}:{scale:g}" for name, scale in self.loras.values())
        steps = (len(self.timesteps),) if self.timesteps else self.steps
        fields = {
            **{"revision": self.revision, "variant": self.variant},
            **{name: _once(getattr(self, name)) for name in ("tasks", "sizes", "batches")},
            **{name: _once(getattr(self, name)) for name in ("guidance_scales", "strengths")},
            **{"guidance_scale": self.guidance_scale, "steps": None if steps is None else tuple(sorted(set(steps)))},
            **{"opset": self.opset, "precision": self.precision, "vae_precision": self.vae_precision, **told},
            **{"config": None if self.config is None else _told_config(self.config)},
            **{"scheduler": self.scheduler, "timesteps": self.timesteps, "lora": loras or None, "eta": self.eta},
            **{kind: self._told_controls(kind) for kind in KINDS},
            **{"clip_skip": self.clip_skip, "recipe": self.recipe_name, "stream_batch": self.stream_batch},
            **{"lora_ranks": None if self.lora_ranks is None else tuple(sorted(set(self.lora_ranks)))},
            **{"reference_lora": tuple(f"{LOCAL}:{scale:g}" for _, scale in self.references) or None},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _told_controls(self, kind: str) -> dict[str, str] | None:
        told = {c.name: _told(self.sources[c.component]) for c in self.controls if c.kind.name == kind}
        return told or None

    def part_files(self) -> dict[str, Path]:
        """Return what an export reads of the parts that lie here: name in the checkpoint → file."""
        places = {component: source.local for component, source in self.sources.items() if component and source.local}
        folders = {component: place for component, place in places.items() if place.is_dir()}
        if folder := next((place for key, place in folders.items() if key in self.loras), None):
            raise InputError(f"--lora {folder} is a folder, and a .safetensors file was expected: name the one in it")
        recorded = {f"reference-lora-{i}.safetensors": path for i, (path, _) in enumerate(self.references, 1)}
        return (
            recorded
            | {f"{c}.safetensors": place for c, place in places.items() if c not in folders}
            | {
                f"{component}/{path.name}": path
                for component, folder in folders.items()
                for path in part_files_read(folder, settled_variant([folder], self.variant))
            }
        )

    def chain_names(self) -> list[str]:
        """Return the names of the chains that the bundle will have."""
        sizes, batches = self.sizes or Requested.sizes, self.batches or Requested.batches
        shapes = [Shape(height, width, batch) for width, height in sizes for batch in batches]
        found = chains.of(tasks.find(self.tasks or Requested.tasks), shapes)
        return [chains.chain_name(task, shape, shapes[0]) for task, shape in found]

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
        if self.revision is not None and not is_elsewhere(self.source):
            raise InputError(f"--revision {self.revision} is for a hub id, and {self.source} is none: leave it out")
        if self.variant is not None and not any(has_variants(name, part) for name, part in self._named()):
            raise InputError(
                f"--variant {self.variant} is for the weights of a hub id or a folder, and {self.source} is neither: "
                "leave it out"
            )
        folder, parts, config = find(self.source).local, self.part_files(), self.settled_config()
        if folder and config:
            return original.files_read(folder, config, self.scheduler or {}) | parts
        if not folder:
            return parts
        own = files_read(folder, self.variant, self.parts)
        for component, name in self.parts.items():
            # The tiny VAE has to decode this checkpoint's latents, and a file has no config of its own.
            if name == TINY or name.endswith(".safetensors"):
                own.append(folder / component / "config.json")
        return {str(path.relative_to(folder)): path for path in own} | parts

    def requested(self, precision: str, digests: Digests | None = None) -> "Requested":
        """Return the order with every default, `precision` among them.

        `digests`: what is known of the files already. Raises InputError as `files`.
        """
        known = digests or Digests()
        files = {name: known.record(path).sha256 for name, path in self.files().items()}
        config = self.settled_config()
        settled = self.given() | ({} if config is None else {"config": _told_config(config)})
        return Requested(_told(find(self.source)), files, **{"precision": precision, **settled})


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


def _once(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Return the values without repetitions, in their order."""
    return None if values is None else tuple(dict.fromkeys(values))


def _sizes(size: Any) -> tuple[tuple[int, int], ...]:
    """Return the sizes of one size or several."""
    one = len(size) == 2 and all(isinstance(side, int) for side in size)
    return tuple((width, height) for width, height in ((size,) if one else size))
