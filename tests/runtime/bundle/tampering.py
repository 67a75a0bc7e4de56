"""Change a bundle after it was built, and see what is said about it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbochain.runtime import Bundle, BundleError, Pipeline
from turbochain.runtime.bundle import hashing

CHAIN = "text-to-image"
Edit = Callable[[dict[str, Any]], object]
UNET, STEP, DECODER = ("graphs", "unet"), ("graphs", "step"), ("graphs", "vae_decoder")
OF = ("chains", CHAIN)
FEEDS, STAGES, DRAWS, TABLES = (*OF, "feeds"), (*OF, "stages"), (*OF, "draws"), (*OF, "tables")
PROMPT, _, OF_UNET, _, OF_STEP, _, OF_DECODER = ((*STAGES, i) for i in range(7))  # between them those of guidance
TABLE = f"tables/{CHAIN}.safetensors"


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def put(*keys: str | int, value: Any) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return edit


def together(*edits: Edit) -> Edit:
    return lambda value: [edit(value) for edit in edits]


def rehash(bundle: Path, *names: str) -> None:
    """Make bundle.json say what the files are now."""
    records = {name: vars(hashing.describe(bundle / name)) for name in names}
    edit_json(bundle / "bundle.json", lambda m: m["files"].update(records))


def refit(bundle: Path) -> None:
    """Make engine.json say that the engine was built from the graphs as they are now."""
    opened = Bundle.open(bundle)
    edits = (put("graphs", name, "digest", value=opened.graph_digest(name)) for name in opened.manifest.graphs)
    edit_json(engine_json(bundle), together(*edits))


def engine_json(bundle: Path) -> Path:
    (found,) = bundle.glob("engines/*/engine.json")
    return found


def refusal(bundle: Path) -> str:
    """What Pipeline.load says, as one line."""
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """One bit in the middle, size and times as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
