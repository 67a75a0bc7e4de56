"""`turbochain adapter convert`, and LoRA files on a command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbochain.runtime.bundle.names import shapes
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs import adapter_files, adapters
from turbochain.runtime.inputs.numbers import weighted
from turbochain.runtime.pipeline import Pipeline


def add_command(commands: Any) -> None:
    """Add `adapter convert`."""
    parser = commands.add_parser("adapter", help="work with LoRA files", description="Work with LoRA files.")
    ways = parser.add_subparsers(required=True, metavar="WHAT")
    help = "write a LoRA with the names of a bundle's checkpoint, its hash, base and licence"
    convert = ways.add_parser("convert", help=help, description=help[0].upper() + help[1:] + ".")
    convert.set_defaults(command=_convert)
    console.add_debug(convert)
    convert.add_argument("file", type=Path, metavar="FILE", help="a LoRA: kohya's, peft's or diffusers' safetensors")
    convert.add_argument("bundle", metavar="BUNDLE", help="of the model that the LoRA was trained for")
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="ADAPTER.safetensors")
    convert.add_argument("--license", help="of the LoRA, such as openrail++ (default: nothing is said of it)")
    convert.add_argument("--base", help="the checkpoint that it was trained for (default: the bundle's)")


def add_lora(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--lora FILE[:WEIGHT]`, which may be given several times."""
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help=help)


def chosen(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """Return the files and weights of all `--lora` options; InputError if a weight is no finite number."""
    return [(Path(file), weight) for file, weight in (weighted("--lora", text) for text in texts)]


def load_all(pipe: Pipeline, loras: Sequence[tuple[Path, float]]) -> None:
    """Load LoRA files into a pipeline, all active with their weights."""
    for i, (file, _) in enumerate(loras):
        pipe.load_lora_weights(file, adapter_name=str(i))
    if loras:
        pipe.set_adapters([str(i) for i in range(len(loras))], [weight for _, weight in loras])


def _convert(arguments: argparse.Namespace) -> None:
    target: Path = arguments.output
    if target.suffix != ".safetensors":
        raise InputError(f"cannot write {target}: a name that ends in .safetensors was expected; give -o another")
    bundle = Bundle.open(arguments.bundle)
    adapter = adapters.read(arguments.file, shapes(bundle))
    base = arguments.base or bundle.manifest.checkpoint.source
    adapter_files.write(adapter, target, base, arguments.license)
    changed = ", ".join(f"{len(added)} of the {component}" for component, added in adapter.components.items())
    print(f"{target}: {changed}")
