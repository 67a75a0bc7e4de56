"""Hash files before they are used, and remember what was hashed."""

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from turbochain.runtime.bundle import lfs
from turbochain.runtime.bundle.paths import AnyPath, resolve_inside
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.errors import BundleError

CHUNK = 64 * 2**20  # bytes hashed as one; a file of at most this size has its plain SHA-256 as digest
_READ = 2**18  # stays in a core's L2 cache between the read and the hash
SETTLED = 2 * 10**9  # ns; a file younger than a coarse clock's tick may change again and look the same
_Progress = Callable[[int], None]


class _Pointer(BundleError):
    """A file was not fetched by Git LFS."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file: its size in bytes and its `digest`."""

    size: int
    sha256: str


def digest(path: AnyPath, *, progress: _Progress | None = None) -> str:
    """Return the file's SHA-256 in hex; if it is larger than `CHUNK`, the SHA-256 of its chunks' concatenated raw
    SHA-256s.

    Chunks are hashed in parallel. `progress` is called, in this thread, with the bytes hashed since its
    last call. Raises OSError when the file cannot be read.
    """
    with _hashers() as pool:
        return _finish(_start(pool, path, os.path.getsize(path)), progress)


def describe(path: AnyPath) -> FileRecord:
    """Return the size and digest of a file, for a manifest. Raises OSError when it cannot be read."""
    return FileRecord(os.path.getsize(path), digest(path))


def check(root: AnyPath, relative: str, record: FileRecord, *, full: bool) -> None:
    """Raise BundleError unless the file `relative` to `root` is what `record` says; see `check_all`."""
    check_all(root, {relative: record}, full=full)


def check_all(
    root: AnyPath, records: Mapping[str, FileRecord], *, full: bool, progress: _Progress | None = None
) -> None:
    """Raise one BundleError that names every file that is missing, outside, truncated or damaged.

    A file over `CHUNK` is not read again while its size, mtime, ctime and inode are those of the stamp that
    its last hash left in the user's cache folder, unless `full`. A stamp can only vouch for a file, never
    accuse it. `progress` is as in `digest`.
    """
    problems, hashing, started, pointers = [], [], time.time_ns(), False
    with _hashers() as pool:
        for relative, record in records.items():
            try:
                path, status = _right_size(root, relative, record)
                if full or record.size <= CHUNK or not _is_stamped(path, status, record.sha256):
                    hashing.append((relative, record, path, status, _start(pool, path, record.size)))
            except _Pointer as problem:
                pointers = True
                problems.append(str(problem))
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
            elif record.size > CHUNK and started - status.st_ctime_ns > SETTLED:
                _leave_stamp(path, status, found)
    if problems:
        several = f"{len(problems)} files are not what the manifest says: " if len(problems) > 1 else ""
        remedy = "Copy the bundle again, or remove it and run build-engine SOURCE again."
        remedy = lfs.remedy(root) if pointers else remedy
        raise BundleError(f"in the bundle {root}, {several}{'; '.join(problems)}. {remedy}")


@contextmanager
def _hashers() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for gigabytes


def _start(pool: ThreadPoolExecutor, path: AnyPath, size: int) -> list[Future[tuple[bytes, int]]]:
    return [pool.submit(_hash_chunk, path, start) for start in range(0, max(size, 1), CHUNK)]


def _hash_chunk(path: AnyPath, start: int) -> tuple[bytes, int]:
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


def _right_size(root: AnyPath, relative: str, record: FileRecord) -> tuple[Path, os.stat_result]:
    path = resolve_inside(root, relative)
    try:
        status = path.stat()
    except OSError as error:
        what = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise BundleError(f"{relative!r} {what}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{relative!r} is not a regular file")
    if status.st_size != record.size and lfs.is_pointer(path):
        raise _Pointer(f"{relative!r} is a Git LFS pointer, not the file itself")
    if status.st_size != record.size:
        how = "is truncated" if status.st_size < record.size else "is too long"
        sizes = f"it has {status.st_size} bytes, the manifest says {record.size}"
        raise BundleError(f"{relative!r} {how}: {sizes}")
    return path, status


def _stamp(path: Path, status: os.stat_result, sha256: str) -> dict[str, str | int]:
    names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    return {"path": str(path), "sha256": sha256, **{name: getattr(status, name) for name in names}}


def user_cache() -> Path:
    """Return the folder for what can be made again: `$XDG_CACHE_HOME/turbochain`, or `~/.cache/turbochain`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "turbochain"


def _stamp_file(path: Path) -> Path:
    """Return `hashes/<SHA-256 of the path>.json` in the user's cache."""
    return user_cache() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _is_stamped(path: Path, status: os.stat_result, sha256: str) -> bool:
    try:
        return bool(json.loads(_stamp_file(path).read_bytes()) == _stamp(path, status, sha256))
    except (OSError, ValueError, RuntimeError):  # unreadable, not JSON, no home folder
        return False


def _leave_stamp(path: Path, status: os.stat_result, sha256: str) -> None:
    # `status` is from before the hash, so a file that changed while it was hashed gets one that cannot match.
    with suppress(OSError, ValueError, RuntimeError):
        leave(_stamp_file(path), json.dumps(_stamp(path, status, sha256)))


def leave(file: Path, text: str) -> None:
    """Write a stamp. Raises OSError or ValueError (InputError) if it cannot be written."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(file, text)
