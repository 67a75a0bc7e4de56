"""Write a site: the page, the module that draws, the packages that it loads, and the bundle's files."""

import html
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from turbochain.runtime.bundle import writing
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import InputError
from turbochain.runtime.web import vendor
from turbochain.runtime.web.manifest import Reduced, reduce

INDEX, MODULE, BUNDLE, PAGE, VENDOR = "index.html", "turbochain.mjs", "bundle", "page", "vendor"
MANIFEST = f"{BUNDLE}/bundle.json"
_PAGE = vendor.HERE.parent / "serve" / "page"
_FIRST = '<meta charset="utf-8">\n'


def export_web(
    bundle: str | Path,
    output: str | Path,
    cdn: str | None = None,
    *,
    force: bool = False,
    engines: str | Path | None = None,
    trust_engines: bool = False,
    node_modules: str | Path | None = None,
) -> Path:
    """Write the folder `output`: a site that draws with the bundle in its visitor's browser; returns the folder.

    Any static server can host it, and it needs nothing else: not the bundle either. The bundle must have an engine of
    the backend `web`. `cdn`: an address that has npm's packages, as PACKAGE@VERSION/…; the site's page then loads ONNX
    Runtime Web and the tokenizers from there, and not from the site. `force`: replace a site that is there. `engines`,
    `trust_engines`: as for `Pipeline.load`. `node_modules`: a folder with the packages; by default npm fetches them.
    The folder is written whole or not at all.

    Raises InputError if there is no such engine or no chain for a page, `output` is there (with `force`: and is no
    site) or cannot be written, npm is missing or fails, or `cdn` is no address; BundleError if a file of the bundle or
    of the engine is not as it was.
    """
    folder = Path(output)
    _check_output(folder, force)
    imported = vendor.imports(cdn)
    reduced = reduce(Bundle.open(bundle, trust_engines=trust_engines), engines)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    try:
        temporary.mkdir()
        _write(temporary, reduced, imported)
        if cdn is None:
            vendor.copy(temporary / VENDOR, None if node_modules is None else Path(node_modules))
        if folder.exists():
            writing.replace_directory(temporary, folder)
        else:
            writing.install_directory(temporary, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_site(folder: Path) -> bool:
    """Return whether a folder is what `export_web` writes."""
    return all((folder / name).is_file() for name in (INDEX, MODULE, MANIFEST))


def _check_output(folder: Path, force: bool) -> None:
    """Refuse before anything is fetched."""
    writing.recover_directories(folder.parent, folder.name)
    if not folder.parent.is_dir():
        raise InputError(f"cannot write {folder}: there is no folder {folder.parent}; make it, or choose another")
    if folder.exists() or folder.is_symlink():
        if not is_site(folder) or folder.is_symlink():
            raise InputError(f"cannot write {folder}: it is there already, and no site; choose another folder")
        if not force:
            raise InputError(f"cannot write {folder}: it is a site already; choose another folder, or --force")


def _write(folder: Path, reduced: Reduced, imported: Mapping[str, str]) -> None:
    """Write everything but the packages."""
    (folder / PAGE).mkdir()
    for part in _PAGE.iterdir():
        if part.name != INDEX:
            shutil.copyfile(part, folder / PAGE / part.name)
    shutil.copyfile(vendor.HERE / MODULE, folder / MODULE)
    (folder / INDEX).write_text(_index((_PAGE / INDEX).read_text(), imported))
    for name, source in reduced.parts.items():
        target = folder / BUNDLE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.source, target)  # no link: onnx refuses data with several names
    (folder / MANIFEST).write_text(reduced.text)


def _index(page: str, imported: Mapping[str, str]) -> str:
    """Return the server's page with what tells it that it draws by itself, before anything is loaded."""
    if page.count(_FIRST) != 1:
        raise InputError(f"{_PAGE / INDEX} is not the page: it has no line {_FIRST.strip()}; install turbochain again")
    found = json.dumps({"imports": imported}, indent=2).replace("<", "\\u003c")
    added = f'<script type="importmap">\n{found}\n</script>\n<meta name="pictures" content="{html.escape(BUNDLE)}/">\n'
    return page.replace(_FIRST, _FIRST + added)
