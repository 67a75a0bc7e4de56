"""Files that can be trusted: hashed before use, written whole or not at all, locked while being made."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from turbochain.runtime.errors import BundleError, InputError, NoSpace

CHUNK = 64 * 2**20  # bytes hashed as one; a file of at most this size has its plain SHA-256 as digest
_READ = 2**18  # stays in a core's L2 cache between the read and the hash
_SETTLED = 2 * 10**9  # ns; a file younger than a coarse clock's tick may change again and look the same
_Path = str | os.PathLike[str]
_Progress = Callable[[int], None]


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file: its size in bytes and its `digest`."""

    size: int
    sha256: str


def digest(path: _Path, *, progress: _Progress | None = None) -> str:
    """Return the file's SHA-256 in hex; over `CHUNK`, that of its chunks' concatenated raw SHA-256s.

    Chunks are hashed in parallel. `progress` is called, in this thread, with the bytes hashed since its
    last call. Raises OSError when the file cannot be read.
    """
    with _hashers() as pool:
        return _finish(_start(pool, path, os.path.getsize(path)), progress)


def describe(path: _Path) -> FileRecord:
    """Return the size and digest of a file, for a manifest. Raises OSError when it cannot be read."""
    return FileRecord(os.path.getsize(path), digest(path))


def check(root: _Path, relative: str, record: FileRecord, *, full: bool) -> None:
    """Raise BundleError unless the file `relative` to `root` is what `record` says; see `check_all`."""
    check_all(root, {relative: record}, full=full)


def check_all(root: _Path, records: Mapping[str, FileRecord], *, full: bool, progress: _Progress | None = None) -> None:
    """Raise one BundleError that names every file that is missing, outside, truncated or damaged.

    A file over `CHUNK` is not read again while its size, mtime, ctime and inode are those of the stamp that
    its last hash left in the user's cache folder, unless `full`. A stamp can only vouch for a file, never
    accuse it. `progress` is as in `digest`.
    """
    problems, hashing, started = [], [], time.time_ns()
    with _hashers() as pool:
        for relative, record in records.items():
            try:
                path, status = _right_size(root, relative, record)
                if full or record.size <= CHUNK or not _is_stamped(path, status, record.sha256):
                    hashing.append((relative, record, path, status, _start(pool, path, record.size)))
            except BundleError as problem:
                problems.append(str(problem))
        for relative, record, path, status, parts in hashing:
            try:
                found = _finish(parts, progress)
            except OSError as error:
                problems.append(f"{relative!r} cannot be read: {error.strerror}")
                continue
            if found != record.sha256:
                hashes = f"its SHA-256 is {found}, the manifest says {record.sha256}"
                problems.append(f"{relative!r} is damaged: {hashes}")
            elif record.size > CHUNK and started - status.st_ctime_ns > _SETTLED:
                _leave_stamp(path, status, found)
    if problems:
        several = f"{len(problems)} files are not what the manifest says: " if len(problems) > 1 else ""
        remedy = "Copy the bundle again, or remove it and run build-engine SOURCE again."
        raise BundleError(f"in the bundle {root}, {several}{'; '.join(problems)}. {remedy}")


@contextmanager
def _hashers() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for gigabytes


def _start(pool: ThreadPoolExecutor, path: _Path, size: int) -> list[Future[tuple[bytes, int]]]:
    return [pool.submit(_hash_chunk, path, start) for start in range(0, max(size, 1), CHUNK)]


def _hash_chunk(path: _Path, start: int) -> tuple[bytes, int]:
    # Read, not mapped: a file that shrinks under a mapping, or a failing disk, kills the process (SIGBUS).
    sha, buffer, left = hashlib.sha256(), memoryview(bytearray(_READ)), CHUNK
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            sha.update(buffer[:count])
            left -= count
    return sha.digest(), CHUNK - left


def _finish(parts: list[Future[tuple[bytes, int]]], progress: _Progress | None) -> str:
    digests = []
    for part in parts:
        sha, size = part.result()
        digests.append(sha)
        if progress:
            progress(size)
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _right_size(root: _Path, relative: str, record: FileRecord) -> tuple[Path, os.stat_result]:
    path = resolve_inside(root, relative)
    try:
        status = path.stat()
    except OSError as error:
        what = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise BundleError(f"{relative!r} {what}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{relative!r} is not a regular file")
    if status.st_size != record.size:
        how = "is truncated" if status.st_size < record.size else "is too long"
        sizes = f"it has {status.st_size} bytes, the manifest says {record.size}"
        raise BundleError(f"{relative!r} {how}: {sizes}")
    return path, status


def _stamp(path: Path, status: os.stat_result, sha256: str) -> dict[str, str | int]:
    names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    return {"path": str(path), "sha256": sha256, **{name: getattr(status, name) for name in names}}


def _stamp_file(path: Path) -> Path:
    """`$XDG_CACHE_HOME/turbochain/hashes/<SHA-256 of the path>.json`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return folder / "turbochain" / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _is_stamped(path: Path, status: os.stat_result, sha256: str) -> bool:
    try:
        return bool(json.loads(_stamp_file(path).read_bytes()) == _stamp(path, status, sha256))
    except (OSError, ValueError, RuntimeError):  # unreadable, not JSON, no home folder
        return False


def _leave_stamp(path: Path, status: os.stat_result, sha256: str) -> None:
    # `status` is from before the hash, so a file that changed while it was hashed gets one that cannot match.
    with suppress(OSError, ValueError, RuntimeError):
        file = _stamp_file(path)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, json.dumps(_stamp(path, status, sha256)))


def resolve_inside(root: _Path, relative: str) -> Path:
    """Return the real path of `relative` (with "/" between folders), which need not exist, inside `root`.

    Raises BundleError if it is empty, absolute, has "..", a backslash or a NUL, or a link leads it outside.
    """
    parts = PurePosixPath(relative).parts
    if not parts:
        why = "it is empty"
    elif relative.startswith("/") or ".." in parts:
        why = 'it is absolute or contains ".."'
    elif "\\" in relative or "\0" in relative:
        why = "it contains a backslash or a NUL"
    else:
        why = "a symbolic link leads outside"
        try:
            real_root = Path(os.path.realpath(root))
            real = Path(os.path.realpath(real_root / relative))
            if real_root in real.parents:
                return real
        except (OSError, ValueError):  # too long, or a lone surrogate
            why = "it cannot be a file name"
    raise BundleError(f"{relative!r} is not a path inside the bundle: {why}")


@contextmanager
def atomic_write(path: _Path, *, size: int | None = None) -> Iterator[BinaryIO]:
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


def write_atomically(path: _Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) as the whole of `path`, as `atomic_write` does. Raises InputError."""
    raw = data.encode() if isinstance(data, str) else data
    with atomic_write(path, size=len(raw)) as file:
        file.write(raw)


def install_directory(temporary: _Path, final: _Path) -> None:
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


def _sync(path: _Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: _Path, error: OSError, size: int | None = None) -> InputError:
    if error.errno != errno.ENOSPC:
        return InputError(f"cannot write {path}: {error.strerror}")
    needed = "" if size is None else f"{size} bytes are needed, "
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    return NoSpace(f"no space left to write {path}: {needed}{free} bytes are free")


@contextmanager
def lock_directory(path: _Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold an exclusive lock on the directory (made if missing) and yield its file descriptor.

    The lock is flock(2) on the directory itself: it leaves no file, and ends with the last process that has
    the descriptor. A worker that must keep it alive is given it with `subprocess.Popen(pass_fds=[fd])`.
    `on_wait` is called once, before a wait. Inside, `path` names the locked directory, new and empty if its
    last owner renamed it. On a network file system it may exclude only processes of this machine. Raises
    InputError when the directory cannot be made or locked.
    """
    try:
        descriptor = _lock(path, on_wait)
    except OSError as error:
        raise InputError(f"cannot lock {path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(path: _Path, on_wait: Callable[[], None] | None) -> int:
    while True:
        os.makedirs(path, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as undo:  # removed or renamed meanwhile: try again
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait:
                    on_wait()
                on_wait = None
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                undo.pop_all()
                return descriptor
