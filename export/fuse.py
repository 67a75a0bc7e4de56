"""Apply LoRA files: fuse them into the weights of a model, as peft does, and let diffusers do it with peft."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from turbochain.export.sources.adapters import require_peft
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.adapter_names import PREFIXES, TEXT
from turbochain.runtime.inputs.adapters import Adapter, LowRank

_NAME = "reference"  # of a LoRA that is not fused


def merge(weight: torch.Tensor, added: LowRank, strength: float) -> torch.Tensor:
    """Return a linear layer's or a convolution's weight with `strength` times a LoRA added, in fp32, bit for bit as
    peft."""
    down, up = (torch.from_numpy(matrix.astype("float32")) for matrix in (added.down, added.up))
    scale = added.scale * strength
    if weight.ndim == 2:
        return weight.float() + (up @ down) * scale
    if weight.shape[2:] == (1, 1):
        return weight.float() + (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None] * scale
    return weight.float() + functional.conv2d(down.transpose(0, 1), up).transpose(0, 1) * scale


def apply(model: nn.Module, component: str, weights: Sequence[Path], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Fuse LoRA files, one after the other, into a loaded component, in place.

    `weights`: its safetensors files. Each weight is taken from there as it is stored, merged in fp32 and rounded once
    to the model's dtype, so that no fp32 copy of the model is needed.
    """
    from safetensors import safe_open

    added = [(adapter.components.get(component, {}), strength) for adapter, strength in adapters]
    names = {name for changes, _ in added for name in changes}
    parameters = {name.removeprefix(TEXT): parameter for name, parameter in model.named_parameters()}
    with ExitStack() as stack, torch.no_grad():
        for file in (stack.enter_context(safe_open(path, framework="pt")) for path in weights):
            for name in sorted(names.intersection(file.keys())):
                merged = file.get_tensor(name)
                for changes, strength in added:
                    if name in changes:
                        merged = merge(merged, changes[name], strength)
                parameters[name.removeprefix(TEXT)].copy_(merged)


def with_diffusers(pipeline: Any, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Fuse LoRA files, one after the other, into a pipeline of diffusers, with its own functions.

    Raises InputError if peft is missing, or diffusers cannot load a file, or not all of it.
    """
    require_peft()
    components = [c for c in PREFIXES if c in pipeline.components]
    for adapter, strength in adapters:
        with _explained(adapter):
            _load(pipeline, adapter.path)
            _require_all(pipeline, adapter)
            pipeline.fuse_lora(components=components, lora_scale=strength)
            pipeline.unload_lora_weights()


@contextmanager
def loaded(pipeline: Any, adapter: Adapter, strength: float) -> Iterator[None]:
    """Let a pipeline of diffusers draw with a LoRA file that is not fused, until the block ends.

    Raises InputError if diffusers cannot load the file, or not all of it.
    """
    try:
        with _explained(adapter), _without_aliases(pipeline):
            _load(pipeline, adapter.path, _NAME)
            _require_all(pipeline, adapter)
            pipeline.set_adapters([_NAME], [strength])
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def _without_aliases(pipeline: Any) -> Iterator[None]:
    """Take away what lets clip_skip work (see `load.pipelines`): a LoRA would look for its layers under that name."""
    encoders = [vars(pipeline.components[c]) for c in PREFIXES if c.startswith("text") and c in pipeline.components]
    aliases = [{name: encoder.pop(name) for name in ("text_model",) if name in encoder} for encoder in encoders]
    try:
        yield
    finally:
        for encoder, alias in zip(encoders, aliases, strict=True):
            encoder.update(alias)


@contextmanager
def _explained(adapter: Adapter) -> Iterator[None]:
    """Turn what diffusers raises about a file into an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of layers, once for each file
            yield
    except InputError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OSError) as error:
        why = " ".join(str(error).split())[:400]
        raise InputError(f"{adapter.path} cannot be loaded by diffusers: {why}") from error


def _require_all(pipeline: Any, adapter: Adapter) -> None:
    """Raise InputError if diffusers left out a layer of a file that it has loaded: it only logs that."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for component, changes in adapter.components.items():
        modules = pipeline.components[component].named_modules()
        loaded = {f"{name.removeprefix(TEXT)}.weight" for name, module in modules if isinstance(module, BaseTunerLayer)}
        if left := [name for name in changes if name.removeprefix(TEXT) not in loaded]:
            raise InputError(
                f"{adapter.path} changes {left[0]} of the {component} ({len(left)} such in all), which diffusers "
                "leaves out, and its picture with all of them was expected as the reference: fuse the LoRA into the "
                "checkpoint with the program that made it, and use that checkpoint"
            )


def _load(pipeline: Any, path: Path, name: str | None = None) -> None:
    """Load one file into a diffusers pipeline, in the way in which diffusers reads it correctly; `name`: the
    adapter's."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    if not any(name.startswith(prefix) for name in tensors for names in PREFIXES.values() for prefix in names):
        pipeline.unet.load_lora_adapter(
            path.parent, weight_name=path.name, prefix=None, adapter_name=name
        )  # of a UNet alone
    elif len(_alphas(tensors)) > 1:
        pipeline.load_lora_weights(_without_alphas(tensors), adapter_name=name)
    else:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)


def _alphas(tensors: Mapping[str, torch.Tensor]) -> set[float | None]:
    """Return the different alphas of a file's modules; None for those that have none."""
    modules = [name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")]
    return {float(tensors[f"{m}.alpha"]) if f"{m}.alpha" in tensors else None for m in modules}


def _without_alphas(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a kohya file's tensors with alpha / rank multiplied into each `lora_up`.

    diffusers 0.42 knows the alphas of attention layers by names that peft does not, and gives all of them the one that
    most modules have.
    """
    scaled = {}
    for name, tensor in tensors.items():
        alpha = tensors.get(f"{name.removesuffix('.lora_up.weight')}.alpha")
        if name.endswith(".lora_up.weight") and alpha is not None:
            scaled[name] = tensor.float() * (float(alpha) / tensor.shape[1])
        elif not name.endswith(".alpha"):
            scaled[name] = tensor
    return scaled
