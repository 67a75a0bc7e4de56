"""`turbochain export-web`."""

import argparse
from pathlib import Path
from typing import Any

from turbochain.runtime.commands import console
from turbochain.runtime.web import export_web

HELP = "write a site that draws in its visitor's browser, for any static server"


def add_arguments(parser: Any) -> None:
    """Add the options of the command, beside those of every command on a bundle."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="SITE", help="the folder to write")
    add(
        "--cdn",
        metavar="URL",
        help="load ONNX Runtime Web and the tokenizers from URL/PACKAGE@VERSION (default: npm fetches them into SITE)",
    )
    add("--force", action="store_true", help="replace a site that is there")
    add("--engines", help="folder of the engines (default: the bundle's engines/, the user's cache)")


def export(arguments: argparse.Namespace) -> None:
    """Write the site, and say how large it is. Raises the errors of `export_web`."""
    folder = export_web(
        arguments.bundle,
        arguments.output,
        arguments.cdn,
        force=arguments.force,
        engines=arguments.engines,
        trust_engines=arguments.trust_engines,
    )
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    largest = max(sizes, key=sizes.__getitem__)
    print(
        f"{folder}: {len(sizes)} files, {console.size(sum(sizes.values()))}; the largest is "
        f"{largest.relative_to(folder)}, {console.size(sizes[largest])}"
    )
