"""Write files whole or not at all."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from turbochain.runtime.bundle.paths import AnyPath
from turbochain.runtime.errors import InputError, NoSpace

_ASIDE = ".replaced"


@contextmanager
def atomic_write(path: AnyPath, *, size: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path`, fsynced, when the block ends without an exception.

    Otherwise the old file is intact and the new one removed; a process killed meanwhile leaves a
    `.turbochain-*.tmp` beside it. A library that writes to a path can be given `file.name`. `size`, the bytes
    needed if they are known, is for the message. Raises InputError when the file cannot be written; exceptions
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


def link(source: AnyPath, target: AnyPath) -> None:
    """Give a file a second name, or copy it if the file system cannot; `target` is replaced. Raises InputError."""
    with suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links; or another process was quicker
        with atomic_write(target, size=os.path.getsize(source)) as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file, 2**20)


def install_directory(temporary: AnyPath, final: AnyPath) -> None:
    """Make everything in `temporary` durable, then rename it to `final`, on the same file system.

    Raises InputError when `final` exists or cannot be written; `temporary` is then still there.
    """
    if os.path.lexists(final):
        raise InputError(f"cannot write {final}: it exists already")
    try:
        _sync_all(temporary)
        os.rename(temporary, final)
        _sync(os.path.dirname(os.fspath(final)) or ".")
    except OSError as error:
        raise _cannot_write(final, error) from error


def replace_directory(temporary: AnyPath, final: AnyPath) -> None:
    """Make everything in `temporary` durable, then put it in place of `final` (which may be missing), by two renames.

    A process that is killed meanwhile leaves the old folder as `final` or beside it: `recover_directories` puts it
    back. Raises InputError when `final` cannot be written; it is then as it was.
    """
    final = Path(final)
    aside = final.with_name(f".{final.name}{_ASIDE}")
    try:
        _sync_all(temporary)
        if replaced := final.exists():
            os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced:
                os.rename(aside, final)
            raise
        _sync(final.parent)
        if replaced:
            shutil.rmtree(aside)
    except OSError as error:
        raise _cannot_write(final, error) from error


def recover_directories(parent: AnyPath, name: str | None = None) -> None:
    """Finish what a killed `replace_directory` left in a folder: the old one returns unless the new one is there.

    `name`: the directory's; None: any.
    """
    for aside in Path(parent).glob(f".{'*' if name is None else glob.escape(name)}{_ASIDE}"):
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
        try:
            shutil.rmtree(aside) if final.exists() else os.rename(aside, final)
        except OSError as error:
            raise _cannot_write(final, error) from error


def _sync_all(folder: AnyPath) -> None:
    for path in [*Path(folder).rglob("*"), folder]:
        if os.path.isfile(path) or os.path.isdir(path):
            _sync(path)


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
