"""Load a checkpoint's parts with diffusers and transformers."""

import importlib
import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from turbochain.export import fuse, sampler
from turbochain.export.controls.kind import Control
from turbochain.export.families import Family
from turbochain.export.sources.adapters import read_all
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.errors import InputError


def component(checkpoint: Checkpoint, name: str, dtype: torch.dtype, *, traceable: bool = False) -> Any:
    """Return one component (`unet`, `vae`, `text_encoder`, …) in evaluation mode, with weights in `dtype`.

    The checkpoint's LoRA files are fused into them in fp32 before they are rounded. `traceable`: with the attention of
    a text encoder spelled out, which traces to what TensorRT fuses. Raises InputError if a weight is missing, damaged
    or of a wrong shape, or a LoRA file does not fit.
    """
    library, cls = checkpoint.index[name]
    options: dict[str, Any] = {"dtype": dtype} if library == "transformers" else {"torch_dtype": dtype}
    if library == "transformers":
        options |= {"attn_implementation": "eager"} if traceable else {}
        options["ignore_mismatched_sizes"] = True  # they are refused below: its own message does not name them
    part = checkpoint.parts[name]
    folder = part.folder
    try:
        model, info = getattr(importlib.import_module(library), cls).from_pretrained(
            folder,
            variant=part.own_variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be loaded as {cls}: {_reason(error)}") from error
    option = f"--{name.partition('-')[0].replace('_', '-')}"
    if name in checkpoint.replaced | checkpoint.controls and (unexpected := sorted(info["unexpected_keys"])):
        raise InputError(
            f"the weights in {folder} have no place in its config.json: {', '.join(unexpected[:5])} ({len(unexpected)} "
            f"in all); another config was expected: give {option} a folder with these weights and their own config.json"
        )
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("position_ids"))
    if missing:
        raise InputError(f"the weights in {folder} lack {', '.join(missing[:5])} ({len(missing)} in all)")
    if wrong := info.get("mismatched_keys"):
        shapes = (f"{key} is {list(found)} and should be {list(expected)}" for key, found, expected in list(wrong)[:5])
        raise InputError(f"weights in {folder} have a wrong shape: {', '.join(shapes)}")
    model = model.eval().requires_grad_(False)
    fuse.apply(model, name, part.weights, read_all(checkpoint))
    return model


def pipeline(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """Return diffusers' own pipeline for text-to-image on the CPU, with weights in `dtype`."""
    return pipelines(checkpoint, [TEXT_TO_IMAGE], dtype)[TEXT_TO_IMAGE]


def controlled(
    checkpoint: Checkpoint, nets: Mapping[Control, Any], plain: Mapping[str, Any]
) -> dict[tuple[str, str], Any]:
    """Return (task, mode) → diffusers' own pipeline with a ControlNet or T2I-Adapter. It shares everything else, its
    scheduler too, with the task's pipeline in `plain`."""
    found: dict[tuple[str, str], Any] = {}
    for control, net in nets.items():
        for task, name in checkpoint.family.steered[control.kind.name].pipelines.items():
            if task not in plain:
                continue
            kind, parts = getattr(importlib.import_module("diffusers"), name), {**plain[task].components}
            known = inspect.signature(kind).parameters.keys()
            given = {**_settings(checkpoint, kind), **parts, **checkpoint.family.pipeline_options}
            own = {control.kind.argument: net}
            made = kind(**{n: value for n, value in given.items() if n in known}, **own)
            made.scheduler = plain[task].scheduler
            found[task, control.mode] = made
    return found


def control_defaults(family: Family, task: str, controls: Sequence[Control]) -> dict[str, float]:
    """Return the defaults for what calls with these give beside the picture, as diffusers' pipelines have them."""
    found: dict[str, float] = {}
    for control in controls:
        kind = getattr(importlib.import_module("diffusers"), family.steered[control.kind.name].pipelines[task])
        parameters = inspect.signature(kind.__call__).parameters
        found |= {n: float(parameters[n].default) for n in control.kind.defaults if n in parameters}
    return found


def pipelines(checkpoint: Checkpoint, tasks: Sequence[str], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return diffusers' own pipeline for each task on the CPU, with weights in `dtype`, which all of them share.

    They are made as `from_pretrained` makes them, but for the family's `pipeline_options`. LoRA files are fused by
    diffusers and peft, not by this package. Raises InputError as `component`, or if peft is missing.
    """
    plain, family = replace(checkpoint, adapters=()), checkpoint.family
    parts: dict[str, Any] = {c: component(plain, c, dtype) for c in family.components}
    parts |= {folder: tokenizer(checkpoint, folder) for folder in family.tokenizers.values()}
    found: dict[str, Any] = {}
    for task in tasks:
        kind = pipeline_class(checkpoint, task)
        own = {"scheduler": _own_scheduler(checkpoint, task)}
        found[task] = kind(**{**_settings(checkpoint, kind), **parts, **own, **family.pipeline_options})
        found[task].scheduler = scheduler(checkpoint, task)
        if checkpoint.adapters and len(found) == 1:
            fuse.with_diffusers(found[task], read_all(checkpoint))
    for folder in family.tokenizers.values():  # at the end: LoRAs would look for their layers under that name
        _let_skip(parts[folder.replace("tokenizer", "text_encoder")])
    return found


def _settings(checkpoint: Checkpoint, kind: Any) -> dict[str, Any]:
    """Return what the checkpoint's index says about a pipeline class's settings."""
    named = inspect.signature(kind).parameters.keys() & checkpoint.index.keys()
    return {
        n: checkpoint.index[n] for n in named if not isinstance(checkpoint.index[n], list)
    }  # a list: a part's class


def pipeline_class(checkpoint: Checkpoint, task: str) -> Any:
    """Return diffusers' pipeline class for a task."""
    return getattr(importlib.import_module("diffusers"), checkpoint.family.pipelines[task])


@dataclass(frozen=True)
class Defaults:
    """What diffusers' call of a task's pipeline takes for arguments that are not given."""

    guidance_scale: float
    strength: float = 1.0  # 1 if the call has no strength: it makes every step


def defaults(checkpoint: Checkpoint, task: str) -> Defaults:
    """Return the defaults of a task's pipeline call."""
    parameters = inspect.signature(pipeline_class(checkpoint, task).__call__).parameters
    known = (field.name for field in fields(Defaults))
    return Defaults(**{name: float(parameters[name].default) for name in known if name in parameters})


def tokenizer(checkpoint: Checkpoint, folder: str) -> Any:
    """Return a tokenizer as transformers loads it."""
    library, cls = checkpoint.index[folder]
    path = checkpoint.parts[folder].folder
    try:
        return getattr(importlib.import_module(library), cls).from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers have no common base class for a bad file
        raise InputError(f"{path} cannot be loaded as {cls}: {_reason(error)}") from error


def scheduler(checkpoint: Checkpoint, task: str = TEXT_TO_IMAGE) -> Any:
    """Return the scheduler that a task's pipeline draws with, changed as `checkpoint.scheduler` says.

    It is changed as users do, `pipe.scheduler = CLASS.from_config(pipe.scheduler.config, …)`, so what the pipeline's
    constructor changed of the checkpoint's own is inherited, and nothing is changed afterwards. Raises InputError if a
    class cannot be loaded, or has no such setting.
    """
    own = _own_scheduler(checkpoint, task)
    changes = {name: value for name, value in checkpoint.scheduler.items() if name != "_class_name"}
    if not checkpoint.scheduler:
        return own
    cls = scheduler_class(checkpoint.scheduler.get("_class_name", type(own).__name__))
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    if unknown := sorted(changes.keys() - known):
        raise InputError(f"--scheduler: {cls.__name__} has no {unknown[0]}: it has {', '.join(sorted(known))}")
    try:
        return cls.from_config(own.config, **changes)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--scheduler {json.dumps(checkpoint.scheduler)}: {cls.__name__} fails with these values ("
            f"{_reason(error)}), and others were expected: see those that its documentation names"
        ) from error


def scheduler_class(name: str) -> Any:
    """Return a scheduler's class; InputError if diffusers exports no scheduler of this name, or cannot load it."""
    diffusers = importlib.import_module("diffusers")
    found = getattr(diffusers, name, None)
    if isinstance(found, diffusers.utils.DummyObject):
        raise sampler.refusal(name, f"cannot be loaded: it needs {' and '.join(found._backends)}")
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise InputError(
            f"--scheduler {name}: diffusers exports no scheduler of this name; a class was expected, such as "
            f"{', '.join(sampler.FOREMOST)}"
        )
    return found


def _own_scheduler(checkpoint: Checkpoint, task: str) -> Any:
    """Return the checkpoint's scheduler as its pipeline's class leaves it, whose constructor may change the config.

    `StableDiffusionPipeline` sets `steps_offset` to 1 and `clip_sample` to False; `StableDiffusionXLPipeline` does
    neither. Raises InputError if the class cannot be loaded.
    """
    library, cls = checkpoint.index["scheduler"]
    path = checkpoint.parts["scheduler"].folder
    kind = pipeline_class(checkpoint, task)
    try:
        found = getattr(importlib.import_module(library), cls).from_pretrained(path)
        given = {**checkpoint.family.pipeline_options, "scheduler": found}
        needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # asks to publish the config changed
            return kind(**{**dict.fromkeys(needed), **given}).scheduler
    except ImportError as error:  # diffusers' stand-in for a class that another package is missing for
        raise sampler.refusal(cls, f"cannot be loaded ({_reason(error)})") from error
    except (ValueError, OSError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded as {cls}: {_reason(error)}") from error


def _let_skip(text_encoder: Any) -> None:
    """Let diffusers' clip_skip work, which looks for the final norm in the text encoder's `text_model`: transformers 5
    has it in the encoder itself."""
    if "text_model" not in dict(text_encoder.named_children()):
        vars(text_encoder)["text_model"] = text_encoder  # no submodule: a module cannot be its own


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__
