"""The model families: one module each, discovered automatically, with one constant `FAMILY`.

A family is data and a few functions, without torch; to add one, add a file. `common` holds what they share.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turbochain.runtime.bundle.manifest import Chain
from turbochain.runtime.errors import InputError

Inputs = dict[str, tuple[str, tuple[int, ...]] | None]
"""Input name → (dtype, shape); None: as an earlier graph of the same component puts it out."""


@dataclass(frozen=True)
class Shape:
    """What a bundle is built for."""

    height: int  # pixels, a multiple of 64
    width: int
    batch: int  # pictures per pass


def decoder_channels(vae: Mapping[str, Any]) -> list[int]:
    """The widths of a VAE's decoder, AutoencoderKL's or AutoencoderTiny's, by level; all but one of them double it."""
    return vae["decoder_block_out_channels"] if "decoder_block_out_channels" in vae else vae["block_out_channels"]


@dataclass(frozen=True)
class Stage:
    """One graph to trace."""

    role: str  # as the manifest has it
    component: str  # the checkpoint's folder that holds its weights
    module: str  # the class in export.stages that is traced; its first argument is the loaded component
    inputs: Callable[[Mapping[str, Any], Shape], Inputs]
    # (component → config, shape) → the inputs in the module's order
    outputs: tuple[str, ...]
    arguments: Callable[[Shape], tuple[Any, ...]] = lambda shape: ()  # the module's further arguments
    precision: str | None = None  # this one, whatever is asked for


@dataclass(frozen=True)
class Family:
    """What differs between checkpoints of different pipelines."""

    name: str
    pipeline_class: str  # model_index.json's _class_name
    components: tuple[str, ...]  # folders with weights
    tokenizers: Mapping[str, str]  # chain input that takes the ids → the checkpoint's tokenizer folder
    stages: Mapping[str, Stage]  # graph → stage; those of one component are traced in this order
    chain: Chain
    pipeline_options: Mapping[str, Any]  # further arguments of the diffusers pipeline's constructor
    embeds: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    # (component → config, the UNet call's arguments) → what the text stages must have produced
    check: Callable[[Mapping[str, Any]], list[str]]  # component → config: what is unsupported, as phrases
    tiny_vae: str  # hub id of the AutoencoderTiny that decodes its latents
    latents_scale: float  # the scaling_factor of the VAE whose latents these are

    def precisions(self, asked: str, vae: str | None = None) -> dict[str, str]:
        """Graph → precision, where the user asked for `asked`, and for `vae` of the VAE."""
        return {
            name: stage.precision or (vae if vae and stage.component == "vae" else asked)
            for name, stage in self.stages.items()
        }


def load() -> dict[str, Family]:
    """Every family by the diffusers pipeline class that it serves."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "common"]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {m.FAMILY.pipeline_class: m.FAMILY for m in modules}


def of(pipeline_class: str) -> Family:
    """The family of a pipeline class; InputError that names the supported ones."""
    families = load()
    if pipeline_class not in families:
        raise InputError(
            f"the pipeline class {pipeline_class} is not supported: choose a checkpoint of "
            + " or ".join(sorted(families))
        )
    return families[pipeline_class]
