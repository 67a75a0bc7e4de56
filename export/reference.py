"""Record what diffusers' own pipeline produces, in fp32: every engine is checked against it.

Nothing here computes a picture: the pipeline runs as any user would run it, and hooks write down what goes
in and out of its parts.
"""

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import fuse, inversion, recorded_calls, recording_controls
from turbochain.export.chains import Layout
from turbochain.export.controls.kind import Control
from turbochain.export.magnitudes import magnitudes
from turbochain.export.packing import Packer
from turbochain.export.recording import draw, record_call
from turbochain.export.rounded import computing_in
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Chain
from turbochain.runtime.checks import bounds, metrics


@dataclass(frozen=True)
class Sources:
    """Diffusers' own pipelines, in fp32, which share their components."""

    plain: Mapping[str, Any]  # task → pipeline
    controlled: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    # task, mode of a ControlNet or T2I-Adapter → pipeline
    nets: Mapping[Control, Any] = field(default_factory=dict)

    def of(self, task: str, modes: Collection[str]) -> tuple[Any, Control | None]:
        """Return the pipeline of a call, and what steers its UNet."""
        for control in self.nets:
            if control.mode in modes:
                return self.controlled[task, control.mode], control
        return self.plain[task], None

    def models(self, components: Sequence[str]) -> dict[str, Any]:
        """Return component → model."""
        first = next(iter(self.plain.values()))
        return {c: getattr(first, c) for c in components} | {c.component: net for c, net in self.nets.items()}


def write(
    pipelines: Sources,
    checkpoint: Checkpoint,
    layout: Layout,
    chains: Mapping[str, Chain],
    scale: float,
    more: Mapping[str, Any],
    precisions: Sequence[str],
    path: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Run the trials of every chain, and the first chain with as many prompts as use every added token; write `path`.

    `scale`: the guidance of guided calls.
    `more`: further arguments of every call, such as `timesteps`. `precisions`: those in which calls are drawn
    once more, some of them up to the first prediction, for the error that diffusers has there (see
    `recorded_calls.drawn_again`); the weights are rounded to them for good.

    The file is safetensors: everything fp32, ids and places int32, pictures uint8. Tensors of case i, with R
    evaluations: `i/<name>` of every feed and every result of the chain, [R, …] for those of the loop, as `record_call`
    finds them and `Packer` keeps them; of some calls an excerpt (see `recorded_calls.extent`). `columns/<name>` [T, D]
    are the distinct rows of a column of the time; `magnitude/<component>/<module>` [1] is the largest absolute value
    that the module put out in any case, and `magnitude/<component>/<attention>.scores` that of Q·Kᵀ as its graph forms
    it (see `magnitudes`). The metadata key `cases` is JSON: a list of `Call`.
    """
    first, models = next(iter(pipelines.plain.values())), pipelines.models(checkpoint.family.components)
    tokenizers = [getattr(first, folder) for folder in checkpoint.family.tokenizers.values()]
    calls = list(
        recorded_calls.of_layout(layout, chains, scale, inversion.prompts(first, tokenizers), _can(pipelines, more))
    )
    with_loras = list(recorded_calls.with_loras(checkpoint, layout, calls))
    tensors, packer = dict[str, np.ndarray](), Packer()
    rows = [chains[call.chain].tables[call.table].rows for call in (*calls, *(call for _, call in with_loras))]
    again = recorded_calls.drawn_again(layout, calls, chains)
    done, total = (
        0,
        sum(n + 1 for n in rows) + len(precisions) * sum(rows[i] + 1 if whole else 2 for i, whole in again.items()),
    )

    def advance(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    with contextlib.ExitStack() as stack, torch.inference_mode():
        largest = stack.enter_context(magnitudes(models))
        first.unet.register_forward_hook(advance)
        for i, call in enumerate(calls):
            pipeline, control = pipelines.of(chains[call.chain].task, call.modes)
            pipeline.set_progress_bar_config(disable=True)
            extent = recorded_calls.extent(layout, chains[call.chain], control)
            found = record_call(pipeline, checkpoint, chains[call.chain], call, more, control, extent)
            tensors |= {
                f"{i}/{name}": value for name, value in packer.pack(found, chains[call.chain], call.table).items()
            }
            advance()
    with torch.inference_mode():
        for adapter, call in with_loras:
            pipeline, _ = pipelines.of(chains[call.chain].task, call.modes)
            with fuse.loaded(pipeline, *adapter):
                found = record_call(pipeline, checkpoint, chains[call.chain], call, more)
            kept = packer.pack(found, chains[call.chain], call.table)
            tensors |= {f"{len(calls)}/{name}": value for name, value in kept.items()}
            calls.append(call)
            advance()
    for precision in precisions:
        with computing_in(models, precision), torch.inference_mode():
            for i in again:
                chain = chains[calls[i].chain]
                source, control = pipelines.of(chain.task, calls[i].modes)
                pipeline = copy.copy(source)
                pipeline.scheduler = copy.deepcopy(pipeline.scheduler)  # as in `record_call`
                own: dict[str, float] = {}
                with _predictions(pipeline.unet, all_of_them=again[i]) as predictions:
                    image = draw(pipeline, chain, calls[i], more, _feed(checkpoint, control))
                    own |= _error(image, tensors[f"{i}/image"])
                if chain.task == TEXT_TO_IMAGE:
                    own |= _error_of_prediction(predictions[0], tensors, i)
                if own:
                    calls[i].errors[precision] = own
                advance()
    tensors |= packer.columns()
    tensors |= {f"magnitude/{name}": np.array([value], np.float32) for name, value in largest.items()}
    in_order = {name: np.asarray(array, order="C") for name, array in tensors.items()}  # safetensors reads no strides
    path.write_bytes(save(in_order, metadata={"cases": json.dumps([asdict(call) for call in calls])}))


def _can(pipelines: Sources, more: Mapping[str, Any]) -> Callable[[str, str], bool]:
    """Return whether diffusers' pipeline of a task and a mode takes the arguments `more`."""

    def can(task: str, mode: str) -> bool:
        return more.keys() <= inspect.signature(pipelines.controlled[task, mode].__call__).parameters.keys()

    return can


class _Enough(Exception):
    """The first prediction was made, and no other is wanted."""


@contextlib.contextmanager
def _predictions(unet: Any, *, all_of_them: bool) -> Iterator[list[torch.Tensor]]:
    """Collect what a UNet makes; end the block after the first unless all are wanted."""
    found: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, made: Any) -> None:
        found.append(made[0])
        if not all_of_them:
            raise _Enough

    handle = unet.register_forward_hook(keep)
    try:
        yield found
    except _Enough:
        pass
    finally:
        handle.remove()


def _error_of_prediction(made: torch.Tensor, tensors: Mapping[str, np.ndarray], i: int) -> dict[str, float]:
    """Return the error of the first prediction of a call from text, whose latents do not depend on the precision."""
    halves = [f"{i}/{name}" for name in ("negative_prediction", "prediction")]  # diffusers' order, in one batch
    right = np.concatenate([tensors[name][0] for name in halves if name in tensors])
    error = metrics.METRICS["relative_l2"](made.numpy(), right)
    return {"relative_l2": error} if np.isfinite(error) else {}


def _error(image: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return metric → value; {} if the precision was too low for this checkpoint, so that there is no picture."""
    if image.min() == image.max():
        return {}
    return {name: metrics.METRICS[name](image, reference) for name in bounds.BOUNDS["fp16"]["image"]}


def _feed(checkpoint: Checkpoint, control: Control | None) -> str | None:
    return None if control is None else recording_controls.feed(checkpoint.family, checkpoint.configs, control)
