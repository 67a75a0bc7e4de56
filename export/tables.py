"""Write what a bundle holds besides graphs: tokenizer files and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import inversion, load, schedule
from turbochain.export.families import Family, Shape
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tasks import Task
from turbochain.export.tracing import time
from turbochain.runtime.bundle.manifest import TableEntry, TokenizerFile
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


def make(checkpoint: Checkpoint, tasks: Sequence[Task], steps: Sequence[int]) -> dict[str, dict[str, Made]]:
    """Return the tables of every task: task → name → table. All of them have one K."""
    made = {task.name: _of_task(checkpoint, task, steps) for task in tasks}
    K = max(one.table.K for tables in made.values() for one in tables.values())
    return {
        task: {name: replace(one, table=schedule.pad(one.table, K)) for name, one in tables.items()}
        for task, tables in made.items()
    }


def _of_task(checkpoint: Checkpoint, task: Task, steps: Sequence[int]) -> dict[str, Made]:
    scheduler, found = load.scheduler(checkpoint, task.name), {}
    for count in steps:
        for begin in range(count if task.starts_late else 1):
            table = schedule.tabulate(scheduler, count, begin)
            if task.whole_is_noise and not begin:
                start = np.array([[0, table.init_noise_sigma], *table.start[1:]], np.float32)
                table = replace(table, start=start)
            name = f"{count}-{begin}" if begin else str(count)
            found[name] = Made(TableEntry(count, table.rows, begin), table)
    return found


def write(made: Mapping[str, Made], family: Family, unet: Any, shape: Shape, path: Path) -> None:
    """Write the table file of a chain; the columns are computed once for each distinct timestep.

    `unet`: diffusers', fp32. See `runtime.chain.tables` for the file's layout.
    """
    tables = {name: one.table for name, one in made.items()}
    times = np.array(list(dict.fromkeys(t for table in tables.values() for t in table.timesteps.tolist())), np.float32)
    arrays: dict[str, np.ndarray] = {"timesteps": times}
    for name, table in tables.items():
        places = np.array([int(np.flatnonzero(times == t)[0]) for t in table.timesteps], np.int32)
        for field in ARRAYS:
            arrays[f"{name}/{field}"] = places[table.index] if field == "index" else getattr(table, field)
    with torch.inference_mode():
        for name in family.columns:
            for column, values in time.COLUMNS[name](unet, torch.from_numpy(times)).items():
                arrays[f"columns/{column}"] = values.numpy()
        for name, arguments in family.constants.items():
            arrays[f"constants/{name}"] = time.CONSTANTS[name](unet, *arguments(shape)).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}))


def columns(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape that each column of a table file fills."""
    from safetensors import safe_open

    found = {}
    with safe_open(path, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            kind, _, name = key.partition("/")
            if kind in ("columns", "constants"):
                found[name] = tuple(file.get_slice(key).get_shape()[kind == "columns" :])
    return found
