"""Write files whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from turbochain.runtime.bundle.paths import AnyPath
from turbochain.runtime.errors import InputError, NoSpace


@contextmanager
def atomic_write(path: AnyPath, *, size: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path`, fsynced, when the block ends without an exception.

    Otherwise the old file is intact and the new one removed; a process killed meanwhile leaves a
    `.turbochain-*.tmp` beside it. A library that writes to a path can be given `file.name`. `size`, the bytes
    needed where known, is for the message. Raises InputError when the file cannot be written; exceptions
    about other files, raised in the block, pass unchanged.
    """
    folder = os.path.dirname(os.fspath(path)) or "."
    temporary = os.path.join(folder, f".turbochain-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(folder)
    except OSError as error:
        if error.filename not in (None, temporary, folder):
            raise
        raise _cannot_write(path, error, size) from error


def write_atomically(path: AnyPath, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) as the whole of `path`, as `atomic_write` does. Raises InputError."""
    raw = data.encode() if isinstance(data, str) else data
    with atomic_write(path, size=len(raw)) as file:
        file.write(raw)


def install_directory(temporary: AnyPath, final: AnyPath) -> None:
    """Make everything in `temporary` durable, then rename it to `final`, on the same file system.

    Raises InputError when `final` exists or cannot be written; `temporary` is then still there.
    """
    if os.path.lexists(final):
        raise InputError(f"cannot write {final}: it exists already")
    try:
        for path in [*Path(temporary).rglob("*"), temporary]:
            if os.path.isfile(path) or os.path.isdir(path):
                _sync(path)
        os.rename(temporary, final)
        _sync(os.path.dirname(os.fspath(final)) or ".")
    except OSError as error:
        raise _cannot_write(final, error) from error


def _sync(path: AnyPath) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: AnyPath, error: OSError, size: int | None = None) -> InputError:
    if error.errno != errno.ENOSPC:
        return InputError(f"cannot write {path}: {error.strerror}")
    needed = "" if size is None else f"{size} bytes are needed, "
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    return NoSpace(f"no space left to write {path}: {needed}{free} bytes are free")
