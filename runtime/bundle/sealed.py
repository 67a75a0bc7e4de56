"""Files with their own hash, for what a library would silently accept if it is damaged or another machine's."""

import hashlib
from pathlib import Path

from turbochain.runtime.bundle import writing
from turbochain.runtime.errors import InputError

_HASH = 32  # bytes: SHA-256 of what the file is for and of its contents


def read(path: Path, purpose: str = "") -> bytes | None:
    """Return what was written for this `purpose`; None if there is no file.

    Raises InputError if the file cannot be read, is damaged, or was written for another purpose.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if _hash(data[_HASH:], purpose) != data[:_HASH]:
        raise InputError(f"{path} is damaged" + (f", or not for {purpose}" if purpose else ""))
    return data[_HASH:]


def write(path: Path, contents: memoryview, purpose: str = "") -> None:
    """Write contents for a `purpose`, whole or not at all. Raises InputError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    with writing.atomic_write(path, size=_HASH + contents.nbytes) as file:
        file.write(_hash(contents, purpose))
        file.write(contents)


def _hash(contents: bytes | memoryview, purpose: str) -> bytes:
    made = hashlib.sha256(purpose.encode())
    made.update(contents)
    return made.digest()
