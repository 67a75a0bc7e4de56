"""The digests of a source's files, remembered with the bundle, so that gigabytes are hashed once."""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from turbochain.runtime.bundle import hashing, writing
from turbochain.runtime.bundle.hashing import FileRecord
from turbochain.runtime.errors import InputError

MEMORY = "source.json"
"""The file that remembers: in the folder of a bundle, and no part of it."""

_MOST = 500  # files that are remembered


class Digests:
    """Digests of files, each told by its size, times and inode, whatever its name.

    A file is read again if one of these has changed. One that was written in the last seconds is not remembered: it
    may change once more and look the same.
    """

    def __init__(self, *folders: Path) -> None:
        """Remember what builds left in these folders, of which none has to be there."""
        self._known: dict[str, str] = {}
        for folder in folders:
            with suppress(OSError, ValueError):
                found = json.loads((folder / MEMORY).read_text("utf-8"))
                if isinstance(found, dict):
                    self._known |= {key: digest for key, digest in found.items() if isinstance(digest, str)}
        self._saved = set(self._known)

    def unread(self, paths: Iterable[Path]) -> int:
        """Return how many bytes have to be read for the digests of these files. Raises InputError as `record`."""
        return sum(status.st_size for status in map(_status, paths) if _key(status) not in self._known)

    def record(self, path: Path, progress: Callable[[int], None] | None = None) -> FileRecord:
        """Return a file's size and digest. `progress`: see `hashing.digest`. Raises InputError if it cannot be read."""
        started, status = time.time_ns(), _status(path)
        key = _key(status)
        found = self._known.pop(key, None)
        try:
            found = found or hashing.digest(path, progress=progress)
        except OSError as error:
            raise _unreadable(path, error) from error
        if started - status.st_ctime_ns > hashing.SETTLED:
            self._known[key] = found  # the last one: what was used longest ago is forgotten first
        return FileRecord(status.st_size, found)

    def save(self, folder: Path) -> None:
        """Write the digests into a folder, unless they are there already or the folder is read-only."""
        kept = dict(list(self._known.items())[-_MOST:])
        if not kept.keys() <= self._saved:
            with suppress(OSError, InputError):
                writing.write_atomically(folder / MEMORY, json.dumps(kept, indent=0))
                self._saved = set(kept)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}")


def _key(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
