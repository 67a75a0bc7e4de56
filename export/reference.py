"""Record what diffusers' own pipeline produces, in fp32: every engine is checked against it.

Nothing here computes a picture: the pipeline runs as any user would run it, and hooks write down what goes
in and out of its parts.
"""

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import fuse, inversion, recording_controls
from turbochain.export.chains import Layout
from turbochain.export.controls.kind import Control
from turbochain.export.magnitudes import magnitudes
from turbochain.export.packing import Packer
from turbochain.export.recording import Call, Extent, draw, record_call
from turbochain.export.rounded import computing_in
from turbochain.export.sources.adapters import read_references
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tasks import Trial
from turbochain.runtime.bundle.hashing import digest
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Chain, TableEntry
from turbochain.runtime.checks import bounds, metrics
from turbochain.runtime.inputs.adapters import Adapter
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT

PROMPTS = (
    "a photo of a cat wearing a red hat, studio light",
    "a lighthouse on a cliff at dusk, oil painting",
    "une petite maison bleue près d'un lac, 水彩画",
    "",
)
"""One case per step count; the rows of a batch go on through the list. Added tokens have cases of their own."""

EXCERPT_ROWS = 2
"""The rows of the loop in an excerpt: with the second, what the sampler carries to it is judged too."""


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
    `more`: further arguments of every call, such as `timesteps`. `precisions`: those in which calls of many evaluations
    are drawn once more, and the first prediction of the first call from text is made, for the error that diffusers has
    there; the weights are rounded to them for good.

    The file is safetensors: everything fp32, ids and places int32, pictures uint8. Tensors of case i, with R
    evaluations: `i/<name>` of every feed and every result of the chain, [R, …] for those of the loop, as `record_call`
    finds them and `Packer` keeps them, or an excerpt of those (see `_extent`);
    `columns/<name>` [T, D] are the distinct rows of a column of the time;
    `magnitude/<component>/<module>` [1] is the largest absolute value that the module put out in any case, and
    `magnitude/<component>/<attention>.scores` that of Q·Kᵀ as its graph forms it (see `magnitudes`). The metadata
    key `cases` is JSON: a list of `Call`.
    """
    first, models = next(iter(pipelines.plain.values())), pipelines.models(checkpoint.family.components)
    tokenizers = [getattr(first, folder) for folder in checkpoint.family.tokenizers.values()]
    calls = list(_calls(layout, chains, scale, inversion.prompts(first, tokenizers), _can(pipelines, more)))
    with_loras = list(_with_loras(checkpoint, layout, calls))
    tensors, packer = dict[str, np.ndarray](), Packer()
    rows = [chains[call.chain].tables[call.table].rows for call in (*calls, *(call for _, call in with_loras))]
    again = _drawn_again(layout, calls, chains)
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
            extent = _extent(layout, chains[call.chain], control)
            found = record_call(pipeline, checkpoint, chains[call.chain], call, more, control, extent)
            tensors |= {f"{i}/{name}": value for name, value in packer.pack(found, chains[call.chain]).items()}
            advance()
    with torch.inference_mode():
        for adapter, call in with_loras:
            pipeline, _ = pipelines.of(chains[call.chain].task, call.modes)
            with fuse.loaded(pipeline, *adapter):
                found = record_call(pipeline, checkpoint, chains[call.chain], call, more)
            kept = packer.pack(found, chains[call.chain])
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
    path.write_bytes(save(tensors, metadata={"cases": json.dumps([asdict(call) for call in calls])}))


def _can(pipelines: Sources, more: Mapping[str, Any]) -> Callable[[str, str], bool]:
    """Return whether diffusers' pipeline of a task and a mode takes the arguments `more`."""

    def can(task: str, mode: str) -> bool:
        return more.keys() <= inspect.signature(pipelines.controlled[task, mode].__call__).parameters.keys()

    return can


def _calls(
    layout: Layout,
    chains: Mapping[str, Chain],
    scale: float,
    of_tokens: Sequence[str],
    can: Callable[[str, str], bool],
) -> Iterator[Call]:
    """Return the calls that are recorded. A chain of a further size or batch is tried once, as its graphs are those
    of the first with other shapes; and once with each ControlNet and T2I-Adapter, if diffusers `can`."""
    asked: list[tuple[str, str, Trial]] = []
    for task, shape in layout.chains:
        name = layout.name(task, shape)
        tables = chains[name].tables
        trials = [t for t in task.trials(_steps(chains[name]), layout.stream) if layout.guided or not t.guided]
        found = [(name, _table(tables, trial), trial) for trial in trials]
        known = {tables[table].guidance_scale for _, table, _ in found}
        others = {e.guidance_scale: table for table, e in tables.items() if e.guidance_scale not in known}
        found += [(name, table, Trial(tables[table].steps, trials[0].strength)) for table in others.values()]
        asked += found if shape == layout.shapes[0] else found[:1]
        modes = [c.mode for c in layout.steered.of(task.name) if can(task.name, c.mode)]
        asked += [
            (name, table, replace(trial, mode=m))
            for m in modes
            for _, table, trial in found[-1 if task.before else 0 :][:1]
        ]
    first = next(iter(chains))
    table, trial = next((table, trial) for name, table, trial in asked if name == first)
    prompts = [_rows(PROMPTS, i, chains[name].batch) for i, (name, _, _) in enumerate(asked)]
    for start in range(0, len(of_tokens), chains[first].batch):
        asked.append((first, table, Trial(trial.steps, trial.strength)))
        prompts.append(_rows(of_tokens, start, chains[first].batch))
    for i, ((name, table, trial), prompt) in enumerate(zip(asked, prompts, strict=True)):
        entry = chains[name].tables[table]
        yield Call(
            chain=name,
            table=table,
            modes=[*(_modes(layout) if trial.guided else []), *filter(None, [trial.mode])],
            prompt=prompt,
            seed=1000 + i,
            num_inference_steps=entry.steps,
            strength=trial.strength if entry.strength is None else entry.strength,
            guidance_scale=scale if trial.guided else entry.guidance_scale or 0.0,
        )


def _with_loras(
    checkpoint: Checkpoint, layout: Layout, calls: Sequence[Call]
) -> Iterator[tuple[tuple[Adapter, float], Call]]:
    """Return a call with each LoRA of the order for the first chain of each task, but for a stream: the first of those
    that are recorded without, and its LoRA and strength."""
    names = [layout.name(task, layout.shapes[0]) for task in layout.tasks if not task.streams]
    for adapter, strength in read_references(checkpoint):
        known = digest(adapter.path)
        for name in names:
            plain = next(call for call in calls if call.chain == name)
            yield (adapter, strength), replace(plain, adapters=[(known, strength)], errors={})


def _extent(layout: Layout, chain: Chain, control: Control | None) -> Extent:
    """Return how much is recorded of a call.

    There are excerpts of calls of a further size or batch, whose graphs are those of the first with other shapes, and
    of calls with a ControlNet, whose residuals are tens of megabytes in each row.
    """
    further = not chain.stream and _is_further(layout, chain)
    return Extent(EXCERPT_ROWS if further or control else None, further)


def _is_further(layout: Layout, chain: Chain) -> bool:
    first = layout.shapes[0]
    return (*chain.size, chain.batch) != (first.height, first.width, first.batch)


def _drawn_again(layout: Layout, calls: Sequence[Call], chains: Mapping[str, Chain]) -> dict[int, bool]:
    """Return the calls of which diffusers' own error in a lower precision is recorded, and whether to their picture:
    those of many evaluations; of the first from text the first prediction is enough, and of those in which the UNet is
    judged with what an engine's own ControlNet or T2I-Adapter makes."""
    from_text = {i: call for i, call in enumerate(calls) if chains[call.chain].task == TEXT_TO_IMAGE}
    steered = {control.mode for control in layout.controls}
    sampled = [
        i for i, call in from_text.items() if steered & {*call.modes} and _is_further(layout, chains[call.chain])
    ]
    many = [i for i, c in enumerate(calls) if bounds.has_many(chains[c.chain].tables[c.table].rows, c.modes)]
    return dict.fromkeys([*list(from_text)[:1], *sampled], False) | dict.fromkeys(many, True)


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


def _rows(prompts: Sequence[str], start: int, batch: int) -> list[str]:
    return [prompts[(start + row) % len(prompts)] for row in range(batch)]


def _feed(checkpoint: Checkpoint, control: Control | None) -> str | None:
    return None if control is None else recording_controls.feed(checkpoint.family, checkpoint.configs, control)


def _modes(layout: Layout) -> list[str]:
    """Return the modes of a guided call; with a negative prompt if that has text encoders of its own, to judge them."""
    return [GUIDANCE, NEGATIVE_PROMPT] if layout.zeros and layout.clip_skip else [GUIDANCE]


def _steps(chain: Chain) -> list[int]:
    return sorted({entry.steps for entry in chain.tables.values()})


def _table(tables: Mapping[str, TableEntry], trial: Trial) -> str:
    """Return the name of the first table of a trial."""
    begin = 0 if trial.strength is None else trial.steps - min(int(trial.steps * trial.strength), trial.steps)
    fits = (n for n, e in tables.items() if e.steps == trial.steps and (e.strength is not None or e.begin == begin))
    return next(fits)
