"""Bundles on the hub: an id becomes the folder of a snapshot in the hub's cache."""

import os
import re
from glob import escape
from pathlib import Path
from typing import Any

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Manifest
from turbochain.runtime.errors import BundleError, InputError

_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def folder(bundle: str | os.PathLike[str], *, engines: bool = False) -> Path:
    """Return the folder of a bundle: `bundle` itself, or its snapshot in the hub's cache if it names one on the hub.

    Only text that names nothing here, nor anything in a folder here, can be an id: OWNER/NAME or OWNER/NAME@REVISION.
    What the manifest lists is downloaded unless it is in the cache; with `engines` also the engines beside it. Raises
    BundleError if there is no such bundle, InputError if the download fails or huggingface_hub is not installed.
    """
    path = Path(bundle)
    may_be = isinstance(bundle, str) and not os.path.lexists(path) and not path.parent.is_dir()
    found = _ID.fullmatch(str(bundle)) if may_be else None
    if found is None:
        return path
    name, revision = found["id"], found["revision"]
    try:
        snapshot = _download(name, revision, ["bundle.json"])
        if not (snapshot / "bundle.json").is_file():
            raise BundleError(f"{name} on the hub is not a bundle; build one: build-engine {name}")
        files = strict_json.read(Manifest, snapshot / "bundle.json").files
        wanted = [*map(escape, files), *(["engines/*"] if engines else [])]
        return _download(name, snapshot.name, ["bundle.json", *wanted])
    except ModuleNotFoundError:
        raise InputError(
            f"{name} is no folder here, and for a bundle on the hub huggingface_hub is missing: "
            "pip install 'turbochain[hub]'"
        ) from None


def id_of(text: str) -> str | None:
    """Return OWNER/NAME, without the revision, if a text has the form of an id on the hub; else None."""
    found = _ID.fullmatch(text)
    return found["id"] if found else None


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read at the import
    import huggingface_hub as hub

    try:
        found: Any = hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the network's errors have no common base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name} is neither a folder here nor, as far as can be told, a bundle on the hub ({reason}); check the "
            "name and the network, and if the repository is gated: hf auth login"
        ) from error
    return Path(found)
