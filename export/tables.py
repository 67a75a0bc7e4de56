"""Write what a bundle holds besides graphs: tokenizer files and tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import inversion, load, sampler, schedule
from turbochain.export.chains import Layout
from turbochain.export.controls.controlnet import own
from turbochain.export.controls.kind import Control
from turbochain.export.families import Family, Shape
from turbochain.export.requested import Requested
from turbochain.export.run import SamplerRun
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tasks import Task, strength
from turbochain.export.tracing import control, time
from turbochain.runtime.bundle.manifest import Chain, TableEntry, TokenizerFile
from turbochain.runtime.chain.tables import ARRAYS, Table
from turbochain.runtime.errors import InputError


def tokenizers(checkpoint: Checkpoint, feeds: Mapping[str, str], folder: Path) -> dict[str, TokenizerFile]:
    """Write each tokenizer's fast file into `folder` and return the manifest's entries; `feeds`: feed → tokenizer.

    The file is saved before any padded call, which would leave truncation and padding in it.
    """
    entries = {}
    for name, component in feeds.items():
        tokenizer = load.tokenizer(checkpoint, component)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{checkpoint.folder / component} has no fast tokenizer: {type(tokenizer).__name__}")
        file = f"{component}.json"
        backend.save(str(folder / file))
        encoder = checkpoint.configs[component.replace("tokenizer", "text_encoder")]
        length = tokenizer.model_max_length
        if length != encoder["max_position_embeddings"]:
            raise InputError(
                f"{checkpoint.folder / component} has model_max_length={length}, and the text encoder reads "
                f"{encoder['max_position_embeddings']} tokens"
            )
        _check(tokenizer, encoder, checkpoint.parts[component].folder)
        pad = (tokenizer.pad_token, tokenizer.pad_token_id)
        entries[name] = TokenizerFile(file, length, *pad, inversion.expansions(tokenizer))
    return entries


def _check(tokenizer: Any, encoder: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError if the tokenizer does what the runtime's does not, or has a token that its encoder lacks."""
    expected = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
    for name, value in expected.items():
        if getattr(tokenizer, name) != value:
            raise InputError(f"{folder} has {name}={getattr(tokenizer, name)!r}, supported is {value!r}")
    rows = encoder.get("vocab_size")
    if lost := [token for token, id_ in tokenizer.added_tokens_encoder.items() if rows is not None and id_ >= rows]:
        raise InputError(
            f"{folder} has the added token {lost[0]!r} ({len(lost)} in all), and its text encoder has {rows} "
            "embeddings, none for that token: save the checkpoint again after diffusers' load_textual_inversion, or "
            "without the token"
        )


@dataclass(frozen=True, eq=False)
class Made:
    """A table and its entry in the manifest."""

    entry: TableEntry
    table: Table


def make(checkpoint: Checkpoint, requested: Requested) -> dict[str, dict[str, Made]]:
    """Return the tables of every task: task → name → table. All of them have one K; InputError if it is above 1 and one
    of the tasks is a stream."""
    tasks = requested.find_tasks(checkpoint.family)
    made = {task.name: dict(_of_task(checkpoint, requested, task)) for task in tasks}
    K = max(one.table.K for tables in made.values() for one in tables.values())
    if K > 1 and any(task.streams for task in tasks):
        raise InputError(
            f"{type(load.scheduler(checkpoint)).__name__} reads what it kept of earlier steps, and a frame of a stream "
            "has only its latents: choose another with --scheduler, such as LCMScheduler or EulerDiscreteScheduler, or "
            "leave stream out of --tasks"
        )
    return {
        task: {name: replace(one, table=schedule.pad(one.table, K)) for name, one in tables.items()}
        for task, tables in made.items()
    }


def layout(checkpoint: Checkpoint, requested: Requested, made: Mapping[str, Mapping[str, Made]]) -> Layout:
    """Return what decides the chains and graphs, with the K of the tables of `make`."""
    K = next(one.table.K for tables in made.values() for one in tables.values())
    return requested.layout(checkpoint.family, checkpoint.configs, K, checkpoint.family.zeros(checkpoint.index))


def chains(
    checkpoint: Checkpoint, requested: Requested, layout: Layout, made: Mapping[str, Mapping[str, Made]]
) -> dict[str, Chain]:
    """Return every chain by its name, with the tables of `make`."""
    return {
        layout.name(task, shape): layout.chain(
            task,
            shape,
            {name: one.entry for name, one in made[task.name].items()},
            defaults(checkpoint, requested, task, made[task.name])
            | load.control_defaults(checkpoint.family, task.name, layout.steered.of(task.name)),
        )
        for task, shape in layout.chains
    }


def _of_task(checkpoint: Checkpoint, requested: Requested, task: Task) -> Iterator[tuple[str, Made]]:
    """Yield a task's tables by name: for every step count, row to begin at, strength and guidance scale."""
    scheduler, scales = load.scheduler(checkpoint, task.pipeline), _scales(checkpoint, requested, task)
    if checkpoint.family.strength_sets_timesteps:
        sampler.require_original_steps(scheduler)
    for run in _runs(checkpoint, requested, task):
        table = schedule.tabulate(scheduler, run)
        if task.whole_is_noise and not run.begin:
            start = np.array([[0, table.init_noise_sigma], *table.start[1:]], np.float32)
            table = replace(table, start=start)
        for scale in scales:
            entry = TableEntry(run.steps, table.rows, run.begin or 0, scale, run.strength)
            said = {"begin": run.begin, "strength": run.strength, "guidance": scale}
            yield " ".join([str(run.steps), *(f"{n} {v:g}" for n, v in said.items() if v)]), Made(entry, table)


def _runs(checkpoint: Checkpoint, requested: Requested, task: Task) -> Iterator[SamplerRun]:
    """Yield how the task's pipeline may call its scheduler."""
    for steps in requested.steps:
        given: dict[str, Any] = {"steps": steps, "timesteps": requested.timesteps, "eta": requested.eta or 0.0}
        if not task.starts_late:
            yield SamplerRun(**given)
        elif task.streams and steps != requested.stream_batch and checkpoint.family.strength_sets_timesteps:
            continue  # every step is made, at any strength
        elif checkpoint.family.strength_sets_timesteps:
            strengths = requested.strengths or (load.defaults(checkpoint, task.pipeline).strength,)
            yield from (SamplerRun(**given, strength=strength) for strength in strengths)
        else:
            begins = [b for b in range(steps) if not task.streams or steps - b == requested.stream_batch]
            yield from (SamplerRun(**given, begin=begin) for begin in begins)


def _scales(checkpoint: Checkpoint, requested: Requested, task: Task) -> Sequence[float | None]:
    """Return the guidance scales that have tables, if the UNet reads the scale itself."""
    if checkpoint.configs["unet"].get("time_cond_proj_dim") is None:
        return (None,)
    own = load.defaults(checkpoint, task.pipeline).guidance_scale
    first = own if requested.guidance_scale is None else requested.guidance_scale
    return requested.guidance_scales or (first,)


def defaults(checkpoint: Checkpoint, requested: Requested, task: Task, made: Mapping[str, Made]) -> dict[str, float]:
    """Return the defaults of a chain's calls: the order's guidance scale or none, diffusers' strength, its eta.

    If tables are made for some values alone, the default is diffusers' if it is one of these, and else the first.
    """
    own, entries = load.defaults(checkpoint, task.pipeline), [one.entry for one in made.values()]
    scales = list(dict.fromkeys(entry.guidance_scale for entry in entries))
    wanted = own.guidance_scale if requested.guidance_scale is None else requested.guidance_scale
    of_tables = wanted if wanted in scales else scales[0]
    without = 0.0 if task.streams else requested.guidance_scale or 0.0  # a stream has no guidance
    found = {"guidance_scale": float(without if of_tables is None else of_tables)}
    if task.starts_late:
        strengths = list(dict.fromkeys(entry.strength for entry in entries))
        found["strength"] = own.strength if {None, own.strength} & {*strengths} else float(strengths[0] or 0.0)
    if task.streams and strengths == [None]:
        counts = [entry.steps for entry in entries]
        if not any(int(n * own.strength) == requested.stream_batch for n in counts):
            found["strength"] = strength(max(counts), requested.stream_batch)
    if requested.eta:
        found["eta"] = requested.eta
    return found


def write(
    made: Mapping[str, Made],
    family: Family,
    unet: Any,
    shape: Shape,
    path: Path,
    nets: Mapping[Control, Any] = MappingProxyType({}),
) -> None:
    """Write the table file of a chain; the columns are computed once for each distinct timestep and guidance scale.

    `unet`: diffusers', fp32; `nets`: the ControlNets of the chain, which have columns of their own. See
    `runtime.chain.tables` for the file's layout, in which `timesteps` has a timestep once for each of its scales.
    """
    pairs = {n: [(t, one.entry.guidance_scale) for t in one.table.timesteps.tolist()] for n, one in made.items()}
    distinct = list(dict.fromkeys(pair for of_table in pairs.values() for pair in of_table))
    times = np.array([t for t, _ in distinct], np.float32)
    arrays: dict[str, np.ndarray] = {"timesteps": times}
    for name, table in ((name, one.table) for name, one in made.items()):
        places = np.array([distinct.index(pair) for pair in pairs[name]], np.int32)
        for field in ARRAYS:
            arrays[f"{name}/{field}"] = places[table.index] if field == "index" else getattr(table, field)
    guided = [scale for _, scale in distinct if scale is not None]
    scales = torch.tensor(guided, dtype=torch.float64) if guided else None
    with torch.inference_mode():
        for name in family.columns:
            for column, values in time.COLUMNS[name](unet, torch.from_numpy(times), scales).items():
                arrays[f"columns/{column}"] = values.numpy()
        for name, arguments in family.constants.items():
            arrays[f"constants/{name}"] = time.CONSTANTS[name](unet, *arguments(shape)).numpy()
        for one, net in nets.items():
            for name in family.columns:
                arrays[f"columns/{own(name, one)}"] = control.COLUMNS[name](net, torch.from_numpy(times)).numpy()
            for name, arguments in family.constants.items():
                arrays[f"constants/{own(name, one)}"] = time.CONSTANTS[name](net, *arguments(shape)).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}))


def columns(*paths: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape that each column of the table files fills."""
    from safetensors import safe_open

    found = {}
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, _, name = key.partition("/")
                if kind in ("columns", "constants"):
                    found[name] = tuple(file.get_slice(key).get_shape()[kind == "columns" :])
    return found
