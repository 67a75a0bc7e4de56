"""What a bundle holds besides graphs: tokenizer files and schedules."""

import dataclasses
from pathlib import Path
from typing import Any

from diffusers.models.embeddings import Timesteps

from turbochain.export import load, schedule_rows
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.errors import InputError


def tokenizers(checkpoint: Checkpoint, folder: Path) -> dict[str, dict[str, Any]]:
    """Write each tokenizer's fast file into `folder`; returns the manifest's entries.

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
        entries[name] = {
            "file": file,
            "max_length": length,
            "pad_token": tokenizer.pad_token,
            "pad_id": tokenizer.pad_token_id,
        }
    return entries


def schedules(checkpoint: Checkpoint, steps: list[int]) -> dict[str, dict[str, Any]]:
    """The table for each step count, from the checkpoint's own scheduler; the manifest's entries."""
    unet = checkpoint.configs["unet"]
    embed = Timesteps(
        unet["block_out_channels"][0],
        flip_sin_to_cos=unet.get("flip_sin_to_cos", True),
        downscale_freq_shift=unet.get("freq_shift", 0),
    )
    scheduler = load.scheduler(checkpoint)
    return {str(n): dataclasses.asdict(schedule_rows.tabulate_rows(scheduler, n, embed)) for n in steps}
