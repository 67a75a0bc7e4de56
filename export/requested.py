"""What a bundle is made from and for, with every default: `request` in bundle.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from turbochain.export import asked, tasks
from turbochain.export.chains import Layout
from turbochain.export.controls import KINDS, Controls
from turbochain.export.controls.kind import Control
from turbochain.export.families import Family, Shape
from turbochain.export.tasks import Task
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from turbochain.runtime.errors import InputError

LOCAL = "a folder"
"""What a bundle says in place of a local folder's or file's name: its files identify it."""


@dataclass(frozen=True)
class Requested:
    """What a bundle is made from and for, as the bundle tells it: `request` in bundle.json."""

    source: str  # its name, or LOCAL
    files: dict[str, str]  # what is read of the sources that lie here: name in the checkpoint → digest
    precision: str
    revision: str | None = None
    variant: str | None = None
    tasks: tuple[str, ...] = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE)
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)  # width, height in pixels
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (1, 2, 3, 4)
    opset: int = 21
    vae_precision: str | None = None
    vae: str | None = None
    config: str | None = None  # of a source that is a file: a preset's name, or LOCAL
    unet: str | None = None
    scheduler: dict[str, Any] | None = None
    timesteps: tuple[int, ...] | None = None
    lora: tuple[str, ...] = ()
    controlnet: dict[str, str] = field(default_factory=dict)
    t2i_adapter: dict[str, str] = field(default_factory=dict)
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_scales: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()
    clip_skip: int = 0
    stream_batch: int = 2
    lora_ranks: tuple[int, ...] = ()  # ascending
    reference_lora: tuple[str, ...] = ()
    recipe: str | None = None

    def find_tasks(self, family: Family) -> list[Task]:
        """Return the tasks; InputError if diffusers has no pipeline of this family for one, or if a stream makes more
        steps than there are."""
        found = tasks.find(self.tasks)
        if unknown := [task.name for task in found if task.pipeline not in family.pipelines]:
            raise InputError(
                f"{family.pipeline_class} has no pipeline for {unknown[0]}: leave it out of --tasks, and choose from "
                f"{', '.join(family.pipelines)}"
            )
        if any(task.streams for task in found):
            asked.require_steps(self.stream_batch, self.steps)
        return found

    def layout(self, family: Family, configs: Mapping[str, Any], K: int = 1, zeros: bool = False) -> Layout:
        """Return what decides the chains and graphs; K and `zeros` as in `Shape` and `Layout`.

        Raises InputError if these models have no such task, or an option that they do not read is given.
        """
        shapes = [Shape(height, width, batch, K) for width, height in self.sizes for batch in self.batches]
        if self.guidance_scales and configs["unet"].get("time_cond_proj_dim") is None:
            raise InputError(
                "guidance_scales: a UNet that reads the guidance scale was expected, such as an LCM's, and with this"
                " one calls can give any: leave it out, or give the default of calls as guidance_scale"
            )
        if self.strengths and not (family.strength_sets_timesteps and IMAGE_TO_IMAGE in self.tasks):
            raise InputError(
                "strengths: image-to-image of LatentConsistencyModelImg2ImgPipeline was expected among the tasks, and "
                "without it there is no strength, or calls can give any: leave it out"
            )
        layers = (configs[stage.graph]["num_hidden_layers"] for stage in family.prompt_stages)
        if self.clip_skip > (most := min(layers) - family.skipped_layers):
            raise InputError(f"clip_skip {self.clip_skip}: the text encoders have layers for 0 to {most}; choose one")
        if self.lora_ranks and self.clip_skip == most:
            raise InputError(
                f"clip_skip {self.clip_skip}: with slots for LoRAs at most {most - 1} was expected, because "
                "no text encoder's layer with a slot would be left; choose a smaller one, or leave lora_rank out"
            )
        controls = [Control(kind, name) for key, kind in KINDS.items() for name in getattr(self, key)]
        Controls(family, configs, controls).check(shapes, self.tasks)
        return Layout(
            family,
            configs,
            self.find_tasks(family),
            shapes,
            zeros,
            self.clip_skip,
            self.stream_batch,
            self.lora_ranks,
            controls,
        )

    @property
    def call(self) -> dict[str, Any]:
        """Return the further arguments of diffusers' pipeline: explicit timesteps, eta and clip_skip, if they were
        asked for."""
        given: dict[str, Any] = {"timesteps": self.timesteps and list(self.timesteps), "eta": self.eta}
        given["clip_skip"] = self.clip_skip or None
        return {name: value for name, value in given.items() if value is not None}
