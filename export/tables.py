"""Write what a bundle holds besides graphs: tokenizer files and tables."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import inversion, load
from turbochain.export.families import Family, Shape
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import time
from turbochain.runtime.bundle.manifest import TableEntry, TokenizerFile
from turbochain.runtime.chain.tables import ARRAYS, Table
from turbochain.runtime.errors import InputError


def tokenizers(checkpoint: Checkpoint, folder: Path) -> dict[str, TokenizerFile]:
    """Write each tokenizer's fast file into `folder` and return the manifest's entries.

    The file is saved before any padded call, which would leave truncation and padding in it.
    """
    entries = {}
    for name, component in checkpoint.family.tokenizers.items():
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


def entries(tables: Mapping[int, Table]) -> dict[str, TableEntry]:
    """Return the manifest's entries of tables, step count → table."""
    return {str(steps): TableEntry(steps, table.rows) for steps, table in tables.items()}


def write(
    tables: Mapping[Any, Table],
    family: Family,
    unet: Any,
    shape: Shape,
    path: Path,
    guidance: Mapping[Any, float] = MappingProxyType({}),
) -> None:
    """Write the table file of a chain; the columns are computed once for each distinct timestep and guidance scale.

    `tables`: by name in the file; `unet`: diffusers', fp32; `guidance`: of each table, if the UNet is an LCM's. See
    `runtime.chain.tables` for the file's layout, in which `timesteps` has a timestep once for each of its scales.
    """
    pairs = {name: [(t, guidance.get(name)) for t in table.timesteps.tolist()] for name, table in tables.items()}
    distinct = list(dict.fromkeys(pair for of_table in pairs.values() for pair in of_table))
    times = np.array([t for t, _ in distinct], np.float32)
    arrays: dict[str, np.ndarray] = {"timesteps": times}
    for name, table in tables.items():
        places = np.array([distinct.index(pair) for pair in pairs[name]], np.int32)
        for field in ARRAYS:
            arrays[f"{name}/{field}"] = places[table.index] if field == "index" else getattr(table, field)
    scales = torch.tensor([scale for _, scale in distinct], dtype=torch.float64) if guidance else None
    with torch.inference_mode():
        for name in family.columns:
            for column, values in time.COLUMNS[name](unet, torch.from_numpy(times), scales).items():
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
