"""Resolve paths that a manifest names, inside the bundle only."""

import os
from pathlib import Path, PurePosixPath

from turbochain.runtime.errors import BundleError

AnyPath = str | os.PathLike[str]


def resolve_inside(root: AnyPath, relative: str) -> Path:
    """Return the real path of `relative` (with "/" between folders), which need not exist, inside `root`.

    A link may also lead to a file of `blobs(root)`. Raises BundleError if the path is empty, absolute, has "..", a
    backslash or a NUL, or a link leads it outside.
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
            if real_root in real.parents or real.parent == blobs(real_root):
                return real
        except (OSError, ValueError):  # too long, or a lone surrogate
            why = "it cannot be a file name"
    raise BundleError(f"{relative!r} is not a path inside the bundle: {why}")


def blobs(root: AnyPath) -> Path | None:
    """Return the folder that the hub's cache keeps contents in, if `root` is (in) a snapshot of that cache; else None.

    The layout is `snapshots/COMMIT/…` with links to `blobs/HASH` beside `snapshots`.
    """
    real = Path(os.path.realpath(root))
    for folder in (real, *real.parents):
        beside = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and beside.is_dir() and not beside.is_symlink():
            return beside
    return None
