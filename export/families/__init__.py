"""The model families: one module each, discovered automatically, with one constant `FAMILY`.

A family is data and a few functions, without torch; to add one, add a file. `common` holds what they share.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Stage
from turbochain.runtime.errors import InputError

Inputs = dict[str, tuple[str, tuple[int, ...]] | None]
"""Input name → (dtype, shape); None: a column of the table, which has its shape."""


@dataclass(frozen=True)
class Shape:
    """What a chain is built for."""

    height: int  # pixels, a multiple of 8
    width: int
    batch: int  # pictures per pass
    K: int = 1  # tensors that go round the loop, see runtime.chain.tables
    rows: int = 0  # rows of a stream's table that one launch makes, as its batch; 0: it makes one row


def decoder_channels(vae: Mapping[str, Any]) -> list[int]:
    """Return the widths of a VAE's decoder (AutoencoderKL or AutoencoderTiny) by level; all but one double the size."""
    return vae["decoder_block_out_channels"] if "decoder_block_out_channels" in vae else vae["block_out_channels"]


@dataclass(frozen=True)
class GraphSpec:
    """One graph to trace."""

    role: str  # as the manifest has it
    component: str  # the checkpoint's folder that holds its weights; "" if it has none
    module: str  # the class in export.tracing.modules that is traced; its first argument is the loaded component
    inputs: Callable[[Mapping[str, Any], Shape], Inputs]
    # (component → config, shape) → the inputs in the module's order
    outputs: tuple[str, ...]
    arguments: Callable[[Shape], tuple[Any, ...]] = lambda shape: ()  # the module's further arguments
    precision: str | None = None  # this one, whatever is asked for
    sized: bool = True  # whether it depends on the size of a picture
    of_rows: bool = False  # whether it makes all rows of a stream at once, and so is for a shape with `rows`
    reads: tuple[str, ...] = ()  # the features of the kinds of `export.controls` whose results it reads
    rank: int = 0  # of its slots for adapters; 0: it has none

    @property
    def features(self) -> tuple[str, ...]:
        """Return what it has beside the plain graph of its role, as the manifest has it."""
        return (*self.reads, "lora") if self.rank else self.reads


@dataclass(frozen=True)
class SteeredBy:
    """What a family needs for one kind of network that steers its UNet with a picture: see `export.controls`."""

    pipelines: Mapping[str, str]  # task → diffusers' pipeline class
    module: str = ""  # the class in export.tracing.control that is traced in each step


@dataclass(frozen=True)
class Family:
    """What differs between checkpoints of different pipelines."""

    name: str
    title: str  # its best-known models, for people
    pipelines: Mapping[str, str]  # task → diffusers' pipeline class; the first is that of a checkpoint
    kin: tuple[str, ...]  # other classes whose checkpoints these can draw; a ControlNet is ignored
    components: tuple[str, ...]  # folders with weights
    tokenizers: Mapping[str, str]  # feed that takes the ids → the checkpoint's tokenizer folder
    graphs: Mapping[str, GraphSpec]  # role → spec, but for those of `common.graphs`; of one component in this order
    vae_encoder: str  # the class in export.tracing.modules that is traced
    prompt_stages: tuple[Stage, ...]  # of every chain: what runs once for a prompt
    columns: tuple[str, ...]  # what the UNet makes of a timestep: see COLUMNS in export.tracing.time
    constants: Mapping[str, Callable[[Shape], tuple[Any, ...]]]
    # columns that are the same in every row: name → arguments, see CONSTANTS in export.tracing.time
    slot_columns: tuple[str, ...]  # further columns that the UNet reads if it has slots for adapters
    pipeline_options: Mapping[str, Any]  # further arguments of the diffusers pipelines' constructors
    zeros: Callable[[Mapping[str, Any]], bool]  # model_index.json → whether no negative prompt is zeros, and not ""
    embeds: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    # (component → config, the UNet call's arguments) → what the prompt's stages must have produced
    check: Callable[[Mapping[str, Any]], list[str]]  # component → config: what is unsupported, as phrases
    tiny_vae: str  # hub id of the AutoencoderTiny that decodes its latents
    latents_scale: float  # the scaling_factor of the VAE whose latents these are
    skipped_layers: int = 0  # how many of the text encoders' last layers are left out of every prompt
    strength_sets_timesteps: bool = (
        False  # whether the timesteps of image-to-image depend on strength: no step is left out
    )
    steered: Mapping[str, SteeredBy] = field(default_factory=dict)  # kind of `export.controls` → how

    @property
    def pipeline_class(self) -> str:
        """Return diffusers' class for text-to-image."""
        return self.pipelines[TEXT_TO_IMAGE]


def load() -> dict[str, Family]:
    """Return every family by its diffusers pipeline class."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "common"]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {m.FAMILY.pipeline_class: m.FAMILY for m in modules}


def of(pipeline_class: str) -> Family:
    """Return the family of a pipeline class; InputError that names the supported ones."""
    families = load()
    for family in families.values():
        if pipeline_class in (*family.pipelines.values(), *family.kin):
            return family
    raise InputError(
        f"the pipeline class {pipeline_class} is not supported: choose a checkpoint of "
        f"{' or '.join(sorted(families))}, or of their image-to-image, inpainting and ControlNet pipelines"
    )
