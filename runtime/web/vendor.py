"""The npm packages that a site loads: fetched as the lock file says, or left where the user serves them."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from turbochain.runtime.errors import InputError

HERE = Path(__file__).parent
LOCK = HERE / "package-lock.json"
_INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=dev")
_SECONDS = 600.0


@dataclass(frozen=True)
class Package:
    """What a site needs of a package."""

    name: str  # npm's
    folder: str  # in the site's vendor/
    modules: Mapping[str, str]  # what `turbochain.mjs` imports → the file in the package's dist/
    others: tuple[str, ...]  # further files there, which the modules load from beside them
    license: Path | None = None  # its text, if the package has no file LICENSE

    @property
    def version(self) -> str:
        """Return the version in the lock file."""
        found: str = json.loads(LOCK.read_bytes())["packages"][f"node_modules/{self.name}"]["version"]
        return found


PACKAGES = (
    Package(
        "onnxruntime-web",
        "onnxruntime-web",
        {
            "onnxruntime-web/webgpu": "ort.webgpu.bundle.min.mjs",
            "onnxruntime-web/wasm": "ort.wasm.bundle.min.mjs",
        },
        ("ort-wasm-simd-threaded.asyncify.wasm", "ort-wasm-simd-threaded.wasm"),
        HERE / "onnxruntime-web.LICENSE",
    ),
    Package("@huggingface/tokenizers", "tokenizers", {"@huggingface/tokenizers": "tokenizers.min.mjs"}, ()),
)


def imports(cdn: str | None) -> dict[str, str]:
    """Return the import map: what `turbochain.mjs` imports → address, in the site's vendor/ or at `cdn`.

    Raises InputError if `cdn` is no address.
    """
    if cdn is None:
        return {bare: f"./vendor/{p.folder}/{file}" for p in PACKAGES for bare, file in p.modules.items()}
    if not (cdn.startswith("/") or urlsplit(cdn).scheme in ("http", "https")) or any(c.isspace() for c in cdn):
        raise InputError(
            f"--cdn {cdn}: an address that has npm's packages as PACKAGE@VERSION was expected, which begins with "
            "https:// or /; leave it out to have them in the site"
        )
    start = cdn.rstrip("/")
    return {bare: f"{start}/{p.name}@{p.version}/dist/{f}" for p in PACKAGES for bare, f in p.modules.items()}


def copy(target: Path, node_modules: Path | None = None) -> None:
    """Write what a site needs of the packages, and their licences, into `target` (created).

    `node_modules`: where they are installed; None: npm fetches them. Raises InputError if they are not there or of
    other versions, or npm is not or cannot fetch them.
    """
    if node_modules is None:
        with _installed() as found:
            copy(target, found)
        return
    for package in PACKAGES:
        source, folder = node_modules / package.name, target / package.folder
        _check_version(package, source)
        folder.mkdir(parents=True)
        for file in (*package.modules.values(), *package.others):
            shutil.copyfile(source / "dist" / file, folder / file)
        shutil.copyfile(package.license or source / "LICENSE", folder / "LICENSE")


def _check_version(package: Package, source: Path) -> None:
    try:
        version = json.loads((source / "package.json").read_bytes())["version"]
    except (OSError, ValueError, KeyError):
        version = None
    if version != package.version:
        has = "is not there" if version is None else f"has version {version}"
        raise InputError(
            f"{source} {has}, and version {package.version} was expected: install the packages of {LOCK} with npm ci"
        )


@contextmanager
def _installed() -> Iterator[Path]:
    """Install the packages of the lock file in a temporary folder; yields its node_modules."""
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "the site needs packages that npm fetches, and npm was not found: install Node.js, or give --cdn with an "
            "address that has them"
        )
    with tempfile.TemporaryDirectory(prefix="turbochain-npm-") as name:
        folder = Path(name)
        for file in ("package.json", LOCK.name):
            shutil.copy(HERE / file, folder)
        if said := _npm(npm, folder):
            raise InputError(
                f"npm cannot fetch the packages of the site ({said}): let it reach its registry, or give --cdn "
                "with an address that has them"
            )
        yield folder / "node_modules"


def _npm(npm: str, folder: Path) -> str:
    """Install the packages of a folder; returns what went wrong, or nothing."""
    try:
        done = subprocess.run(
            [npm, *_INSTALL], cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it had not ended after {_SECONDS:g} s"
    except OSError as error:
        return f"it does not start: {error.strerror}"
    said = next((line for line in reversed(done.stderr.splitlines()) if "error" in line), "it says nothing")
    return said.strip() if done.returncode else ""
