"""What an interrupted build had finished, so that the next one goes on from there."""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from turbochain.runtime.bundle import hashing, writing
from turbochain.runtime.errors import BundleError

STATE = "state.json"


class Finished:
    """`state.json` in a locked folder: the request, and which parts of it are done, with their files.

    A folder that was left by another request is emptied.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self._folder = folder
        self.value: dict[str, Any] = {"request": request, "done": {}}
        try:
            old = json.loads((folder / STATE).read_text())
        except (OSError, ValueError):
            old = None
        if old and old.get("request") == request:
            self.value = old
        else:
            empty(folder)

    def once(self, key: str, make: Callable[[], Any], made: Callable[[Any], list[str]]) -> Any:
        """Return the result of `make`, or of an earlier build if its files (`made`) are still as they were."""
        done = self.value["done"].get(key)
        if done and self._intact(done["files"]):
            return done["result"]
        result = make()
        records = {
            name: dataclasses.asdict(hashing.describe(self._folder / name)) for name in dict.fromkeys(made(result))
        }
        self.value["done"][key] = {"result": result, "files": records}
        writing.write_atomically(self._folder / STATE, json.dumps(self.value))
        return result

    def _intact(self, records: dict[str, Any]) -> bool:
        try:
            hashing.check_all(self._folder, {n: hashing.FileRecord(**r) for n, r in records.items()}, full=False)
        except BundleError:
            return False
        return True

    def records(self, *keys: str) -> dict[str, hashing.FileRecord]:
        """Return every file that was made (under these keys, if any are given), with its hash."""
        done = [entry for key, entry in self.value["done"].items() if not keys or key in keys]
        return {name: hashing.FileRecord(**r) for entry in done for name, r in sorted(entry["files"].items())}


def empty(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in `folder` but the files named in `keep`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in keep:
            path.unlink()


def leave_nothing(folder: Path) -> None:
    """Remove the folder with everything in it."""
    empty(folder)
    folder.rmdir()
