"""Put a bundle into the hub's cache by hand, as `snapshot_download` would: links to contents that are named by hash."""

import hashlib
import os
import shutil
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0de"
NAME = "someone/sd-turbo-bundle"


def put(bundle: Path, cache: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Put the files of a folder into the cache as the repository `NAME`; return its snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        if (name := file.relative_to(bundle)).parts[0] in without:
            continue
        blob, link = blobs / hashlib.sha256(file.read_bytes()).hexdigest(), snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    return snapshot
