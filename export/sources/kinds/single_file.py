"""A file instead of a folder: refused, with the way out."""

from pathlib import Path

from turbochain.export.sources import ON_DISK, Kind, Source
from turbochain.runtime.errors import InputError


def _find(name: str) -> Source | None:
    if Path(name).exists() and not Path(name).is_dir():
        raise InputError(
            f"{name} is a file; a folder in diffusers' format was expected: load the file with diffusers' "
            "from_single_file(...) and call save_pretrained(FOLDER)"
        )
    return None


KIND = Kind("", ON_DISK, _find, parts=False)
