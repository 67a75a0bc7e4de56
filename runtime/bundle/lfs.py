"""Tell a Git LFS pointer from the file that it stands for."""

import os
import shlex

from turbochain.runtime.bundle.paths import AnyPath

_BEGIN = b"version https://git-lfs.github.com/spec/v1\n"


def is_pointer(path: AnyPath) -> bool:
    """Return whether a file is a pointer: the few lines that a clone without Git LFS has in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def remedy(folder: AnyPath) -> str:
    """Return how the files of a clone are fetched, as a sentence; `folder` is any folder in it."""
    return f"Fetch the files: git lfs install && git -C {shlex.quote(os.fspath(folder))} lfs pull"
