"""`export`: a checkpoint → a bundle. `make` is the part that it shares with `turbochain.engines.build`.

A bundle is made in `NAME.bundle.partial/` and renamed when whole. The folder is locked while in use. What is finished
is written down with its hashes, so an interrupted export goes on where it stopped.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from turbochain.export import bundling, recipes
from turbochain.export.options import ExportOptions
from turbochain.export.order import ExportOrder, How
from turbochain.export.phases.bar import Phase
from turbochain.export.phases.phases import LOG, SMALL, PhaseReport, Phases
from turbochain.export.requested import Requested
from turbochain.export.sources.digests import Digests
from turbochain.runtime.bundle.hashing import FileRecord
from turbochain.runtime.bundle.lock import lock_directory
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.bundle.strict_json import plain
from turbochain.runtime.errors import InputError


def export(
    source: str | None = None,
    output: str | Path | None = None,
    *,
    force: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Unpack[ExportOptions],
) -> Path:
    """Make the bundle `output` (default: the source's name + ".bundle", here) without an engine; return its path.

    `source`: a hub id, a local folder in diffusers' format, a .safetensors file in the original names, "demo" (the
    small trained model that comes with this package) or "synthetic:NAME". `options`: those of `ExportOptions`. `force`
    skips the check of memory and disk. `quiet` prints no phases, `verbose` shows what the libraries print.

    The bundle holds what diffusers' own pipelines produced, so an engine of it can be checked anywhere. A second call
    with the same arguments finds the bundle and does nothing. Raises InputError for what cannot be exported.
    """
    order = recipes.settle(ExportOrder.of(source, options))
    if is_bundle(order.source):
        raise InputError(
            f"{order.source} is a bundle already, and a checkpoint was expected: build an engine of it with "
            f"build-engine {order.source}"
        )
    with make(order, How(path_of(order, output), force, quiet, verbose), "fp32", []) as bundle:
        return bundle.path


@contextmanager
def make(order: ExportOrder, how: How, precision: str, reports: list[PhaseReport]) -> Iterator[Bundle]:
    """Lock the bundle `how.output`, made first if it is not there, and yield it.

    A source that is a bundle is copied, without its engines. `precision` is the graphs' precision if the order gives
    none. A report of each phase is appended to `reports`. Raises InputError if another bundle or file is at the path.
    """
    output = how.output
    if (others := recipes.deviations(order)) and not how.quiet:
        print(f"recipe {order.recipe_name}; what is given wins over its {', '.join(others)}", file=sys.stderr)
    if output.exists() and not is_bundle(output):
        raise InputError(f"{output} exists and is not a bundle: choose another path with -o")
    partial = output.with_name(output.name + ".partial")
    digests = Digests(output, partial)
    requested = None if is_bundle(order.source) else _requested(order, how, precision, digests)
    if not is_bundle(output):
        with locked(partial, how.quiet) as lock:
            if not is_bundle(output):
                if requested is None:
                    bundling.copy(Bundle.open(order.source), partial, output)
                else:
                    phases = Phases(lock, None if how.verbose else partial / LOG, how.quiet, reports)
                    bundling.export(phases, order, requested, digests, partial, output, how.force)
                    # Again, for a file that was too young to be remembered is not now.
                    requested = order.requested(precision, digests)
                # The folder was renamed, so its lock is the bundle's now.
                yield _checked(output, order, requested, digests)
                return
            partial.rmdir()  # the owner of the lock that we waited for made the bundle
    with locked(output, how.quiet):
        yield _checked(output, order, requested, digests)


def _requested(order: ExportOrder, how: How, precision: str, digests: Digests) -> Requested:
    """Return what the order requests; shows a bar if much has to be read."""
    files = order.files().values()
    if (total := digests.unread(files)) > SMALL:
        with Phase("hash the source", quiet=how.quiet) as phase:
            done = 0

            def progress(count: int) -> None:
                nonlocal done
                done += count
                phase(done, total)

            for path in files:
                digests.record(path, progress)
    return order.requested(precision, digests)


def is_bundle(path: str | Path) -> bool:
    """Return whether a finished bundle lies there."""
    return Path(path, "bundle.json").is_file()


def path_of(order: ExportOrder, output: str | Path | None) -> Path:
    """Return where the bundle is made: `output`, or the source if it is a bundle, or a name with .bundle, here.

    The name is the recipe's, or the source's.
    """
    if output is not None:
        return Path(output)
    if is_bundle(order.source):
        return Path(order.source)
    if order.recipe_name:
        return Path(order.recipe_name + ".bundle")
    place = Path(order.source)
    if place.is_file():
        return Path(place.stem + ".bundle")
    name = place.resolve().name if place.is_dir() else order.source.rstrip("/").replace(":", "/").rpartition("/")[2]
    return Path(name + ".bundle")


@contextmanager
def locked(path: Path, quiet: bool) -> Iterator[int]:
    """Hold the lock of a folder, made if it is not there; say so on stderr if another process holds it."""

    def say() -> None:
        if not quiet:
            print(f"waiting: another build of {path} is running", file=sys.stderr)

    with lock_directory(path, on_wait=say) as lock:
        yield lock


def _checked(path: Path, order: ExportOrder, requested: Requested | None, digests: Digests) -> Bundle:
    """Return the bundle at `path`; InputError if it is not what is ordered (`requested` None: a bundle as the source).

    What is known of the source's files is left with the bundle.
    """
    bundle, given = Bundle.open(path), order.given()
    have, wanted = bundle.manifest.request, plain(given if requested is None else vars(requested))
    wanted.pop("files", None)
    left = {"precision", "vae_precision"} - set(given)  # by default the bundle's own
    other = [
        f"{name} is {have.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if name not in left and have.get(name) != value
    ]
    if changed := _changed(have.get("files") or {}, order, requested, digests):
        several = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        other.append(f"files of the source have changed: {', '.join(changed[:3])}{several}")
    if requested is None and _exported(Bundle.open(order.source)) != _exported(bundle):
        other = [f"its files are not those of {order.source}"]
    if other:
        raise InputError(f"{path} holds another build ({'; '.join(other)}): choose another path with -o")
    digests.save(path)
    return bundle


def _exported(bundle: Bundle) -> dict[str, FileRecord]:
    """Return the files that a bundle was made with: those that its first engine in int8 added do not count."""
    added = {graph.quantization for graph in bundle.manifest.graphs.values()}
    return {name: record for name, record in bundle.manifest.files.items() if name not in added}


def _changed(before: dict[str, str], order: ExportOrder, requested: Requested | None, digests: Digests) -> list[str]:
    """Return which files in the order's folders differ from `before`, those that a bundle was made from."""
    if requested is not None:
        now = requested.files
    else:  # the bundle is the source; only parts that are named beside it are compared
        now = {name: digests.record(path).sha256 for name, path in order.part_files().items()}
        parts = {name.partition("/")[0] for name in now}
        before = {name: digest for name, digest in before.items() if name.partition("/")[0] in parts}
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
