"""Keep bundles from one session of the tests to the next, in a folder for each state of the code."""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock on `path` (created); raises BlockingIOError if `kind` has LOCK_NB and another process holds it."""
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


def key(root: Path, packages: tuple[str, ...]) -> str:
    """Return a hash of all that a bundle of the tests depends on.

    That is every file of the packages, `pyproject.toml`, `tests/conftest.py` and the modules beside it that are no
    tests, which have the arguments, the version of each installed distribution, and the kind of CPU, because PyTorch's
    random weights differ between them in the last bits.
    """
    files = [path for name in packages for path in (root / name).rglob("*") if "__pycache__" not in path.parts]
    files += [path for path in (root / "tests").glob("*.py") if not path.name.startswith("test_")]
    files.append(root / "pyproject.toml")
    files = sorted(path for path in files if path.is_file())
    found = [f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    found += sorted({f"{distribution.name} {distribution.version}" for distribution in metadata.distributions()})
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text().splitlines()
        found += sorted({line for line in cpu if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def folder(root: Path, key: str) -> Path:
    """Return the folder of `key` below `root` (created), and remove the others that no session is using."""
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "lock"):
        for other in root.iterdir():
            if other.is_dir() and other.name != key:
                with contextlib.suppress(BlockingIOError), locked(other / "in-use", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(other)
        (root / key).mkdir(exist_ok=True)
    return root / key
