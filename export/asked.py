"""Read an order's options, and find what is wrong with them. Torch-free."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from turbochain.runtime.bundle.manifest import STREAM
from turbochain.runtime.errors import InputError
from turbochain.runtime.slots import MOST_RANK

STREAM_BATCHES = (2, 3, 4)
"""How many frames may be under way in a stream."""

RANKS = range(1, MOST_RANK + 1)
"""What the rank of slots for LoRAs may be."""


def scheduler_changes(value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the changes to a scheduler's config that a class name, a JSON object or a mapping gives; None for None.

    The key `_class_name` names another class, as it does in scheduler_config.json. Raises InputError for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value):
        return {"_class_name": value}
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value)
    except ValueError:
        found = None
    if not found or not isinstance(found, dict) or not isinstance(found.get("_class_name", ""), str):
        raise InputError(
            f"--scheduler {value}: a class of diffusers, such as DDIMScheduler, or a JSON object of changes to its "
            """config was expected, such as '{"timestep_spacing": "trailing"}'; for both, name the class in it as """
            '"_class_name"'
        )
    return found


def named(option: str, value: str | Mapping[str, str] | Sequence[str] | None) -> dict[str, str] | None:
    """Return name → place that a mapping, or a list of NAME=PLACE, says; None for None. Raises InputError."""
    if value is None or isinstance(value, Mapping):
        return None if value is None else dict(value)
    found: dict[str, str] = {}
    for text in [value] if isinstance(value, str) else value:
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise InputError(
                f"--{option.replace('_', '-')} {text}: NAME=ID or NAME=FOLDER was expected, with the name that calls "
                f"have for it, such as canny={text}"
            )
        if name in found:
            raise InputError(f"--{option.replace('_', '-')} {text}: there is one of that name already; choose another")
        found[name] = place
    return found


def control_problems(given: Mapping[str, Mapping[str, str] | None]) -> list[str]:
    """Return what is wrong with the names of ControlNets and T2I-Adapters, as phrases; `given`: option → name → …"""
    return [
        f"{option} {name!r}: a name of letters, digits, - and _ was expected"
        for option, names in given.items()
        for name in names or ()
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name)
    ]


def listed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given, with tuples for lists. Raises InputError for a single value of one that takes
    several.

    A text would be taken for a list of letters.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name in ("tasks", "lora", "reference_lora", "steps", "timesteps", "guidance_scales", "strengths"):
        if isinstance(value := given.get(name), str | int | float):
            raise InputError(f"{name} {value!r}: a list was expected, such as [{value!r}]")
    if isinstance(size := given.get("size"), str | int):
        raise InputError(f"size {size!r}: (width, height) was expected, such as (512, 512), or several such pairs")
    return {name: value for name, value in given.items() if value is not None}


def call_problems(
    scale: float | None, scales: tuple[float, ...] | None, strengths: tuple[float, ...] | None
) -> list[str]:
    """Return what is wrong with an order's guidance scales and strengths, as phrases; `scale`: the default."""
    problems = [
        f"guidance scale {value}: a finite number of at least 0 was expected"
        for value in (scale or 0.0, *(scales or ()))
        if not 0 <= value < math.inf
    ]
    if scale is not None and scales and scale not in scales:
        several = ", ".join(f"{value:g}" for value in scales)
        problems.append(f"guidance scale {scale:g}: one of the guidance scales {several} was expected")
    return problems + [
        f"strength {value}: a number above 0, and at most 1, was expected"
        for value in strengths or ()
        if not 0 < value <= 1
    ]


def schedule_problems(steps: tuple[int, ...] | None, timesteps: tuple[int, ...] | None, eta: float | None) -> list[str]:
    """Return what is wrong with these options of an order, as phrases."""
    problems = []
    if timesteps is not None:
        descend = all(a > b for a, b in pairwise(timesteps))
        if not 1 <= len(timesteps) <= 50 or min(timesteps) < 0 or not descend:
            problems.append(
                f"timesteps {list(timesteps)}: 1 to 50 descending numbers from 0 were expected, such as 999,749,499,249"
            )
        elif steps is not None and set(steps) != {len(timesteps)}:
            problems.append(
                f"steps {list(steps)}: {len(timesteps)} timesteps are {len(timesteps)} steps, so leave steps out"
            )
    if eta is not None and not 0 <= eta <= 1:
        problems.append(f"eta {eta}: a number from 0 to 1 was expected")
    return problems


def slot_problems(ranks: tuple[int, ...] | None) -> list[str]:
    """Return what is wrong with the ranks of slots that are asked for, as phrases."""
    if ranks is None or (ranks and all(rank in RANKS for rank in ranks)):
        return []
    return [f"lora_rank {list(ranks)}: ranks from {RANKS[0]} to {RANKS[-1]} were expected, such as 32"]


def stream_problems(stream_batch: int | None, tasks: Collection[str] | None) -> list[str]:
    """Return what is wrong with this option of an order, as phrases."""
    if stream_batch is None:
        return []
    if stream_batch not in STREAM_BATCHES:
        return [f"stream_batch {stream_batch}: {STREAM_BATCHES[0]} to {STREAM_BATCHES[-1]} frames were expected"]
    return [] if STREAM in (tasks or ()) else [f"stream_batch {stream_batch}: it is for the task {STREAM}; add that"]


def require_steps(stream_batch: int, steps: Collection[int]) -> None:
    """Raise InputError if no step count has as many steps as a stream's frame makes."""
    if stream_batch > max(steps):
        raise InputError(
            f"a frame of the stream makes {stream_batch} steps, and the bundle is to make at most {max(steps)}: add a "
            f"larger count with --steps, or choose from {STREAM_BATCHES[0]} to {STREAM_BATCHES[-1]} with --stream-batch"
        )
