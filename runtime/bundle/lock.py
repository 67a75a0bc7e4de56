"""Lock a directory for one builder at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from turbochain.runtime.bundle.paths import AnyPath
from turbochain.runtime.errors import InputError


@contextmanager
def lock_directory(path: AnyPath, *, on_wait: Callable[[], None] | None = None) -> Iterator[int]:
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


def _lock(path: AnyPath, on_wait: Callable[[], None] | None) -> int:
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
