"""The command `build-engine`."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from turbochain.engines import options as backend_options
from turbochain.engines.build import BuildResult, carry_out
from turbochain.engines.order import BuildOrder, engine_order
from turbochain.export import asked, recipes, tasks
from turbochain.export.api import path_of
from turbochain.export.controls import KINDS
from turbochain.export.order import ExportOrder, How
from turbochain.export.requested import Requested
from turbochain.export.sources import original
from turbochain.runtime.bundle import quantization
from turbochain.runtime.checks.verify import bound_text, value_text
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out `build-engine`; returns the exit status (see console.run)."""
    parser = argparse.ArgumentParser(
        "build-engine",
        description="Build a bundle with an engine for this machine, checked against diffusers.",
        epilog=f"{recipes.described()}\n\n{backend_options.described()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="?",
        default="",
        help="a hub id, a folder in diffusers' format, a .safetensors file, demo, synthetic:NAME, or a bundle "
        "(default: the recipe's)",
    )
    _add_how(parser)
    _add_what(parser)

    def carry_out_or_explain(arguments: argparse.Namespace) -> None:
        if not arguments.source and arguments.recipe_name is None:
            parser.error("a source is required, or a recipe (--recipe NAME)")
        _build(arguments)

    return console.run(parser, carry_out_or_explain, argv)


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine, and where and how everything is built."""
    add = parser.add_argument
    add("-o", "--output", help="the bundle (default: the source's name with .bundle, in this folder)")
    add("--backend", help="default: the best for this machine")
    add("--device", help="default: the backend's own choice")
    add("--target", help="build for GPUs of another machine, such as sm89 (TensorRT-RTX; needs no GPU here)")
    add("-O", metavar="NAME=VALUE", action="append", default=[], help="an option of the backend; see below")
    add("--timing-cache", metavar="FOLDER", help="where TensorRT's timings are kept (default: beside the bundle)")
    add("--chains", metavar="NAME,…", help="compile only the graphs of these chains (default: all of the bundle's)")
    add("--engines", metavar="FOLDER", help="keep engines there (default: in the bundle, or the cache if read-only)")
    add("--force", action="store_true", help="build even if memory or disk look too small")
    add("--json", action="store_true", help="print the result as JSON")
    add("-v", "--verbose", action="store_true", help="show what the exporter and the libraries print")


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Add the options of the bundle; see `ExportOptions`."""
    add = parser.add_argument
    add("--precision", help="fp32 or fp16 (default: fp32 for a CPU backend, fp16 for a GPU backend)")
    add("--vae-precision", help="fp32 or bf16, for the VAE instead of --precision")
    add("--vae", help="tiny (TAESD or TAESDXL), a hub id or a folder: this VAE instead of the checkpoint's own")
    add("--tasks", metavar="NAME,…", help=f"of {', '.join(tasks.load())} (default {','.join(Requested.tasks)})")
    add(
        "--size",
        dest="sizes",
        metavar="WxH,…",
        help="width x height in pixels, multiples of 8 (default 512x512); several: 512x512,768x512",
    )
    add("--batch", dest="batches", metavar="N,…", help="pictures per pass (default 1); several: 1,4")
    add("--steps", help="step counts, such as 1-4 or 1,2,4 (default 1-4)")
    add("--opset", type=int, help="of the ONNX graphs, 18 to 23 (default 21)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--variant", help="weight files' variant, such as fp16")
    add("--config", help=f"of a .safetensors file: {', '.join(original.CONFIGS)}, or a folder with its JSON files")
    add(
        "--recipe",
        dest="recipe_name",
        metavar="NAME",
        help="a distilled model; see below. Other options win over it",
    )
    add("--unet", help="a .safetensors file, a hub id, a file of one (owner/name/file) or a folder: this UNet instead")
    add("--lora", metavar="NAME[:SCALE]", action="append", help="fuse this LoRA, named as --unet; may be repeated")
    add(
        "--lora-rank",
        dest="lora_ranks",
        metavar="R,…",
        help="give the graphs slots for LoRAs that are changed between two pictures, of this rank together, 1 to 256",
    )
    add(
        "--reference-lora",
        metavar="FILE[:SCALE]",
        action="append",
        help="record diffusers' pictures with this LoRA, for verify --lora; may be repeated",
    )
    add(
        "--controlnet",
        metavar="NAME=ID|FOLDER",
        action="append",
        help="a ControlNet that calls can use under this name; may be repeated",
    )
    add("--t2i-adapter", metavar="NAME=ID|FOLDER", action="append", help="a T2I-Adapter, likewise; may be repeated")
    add("--scheduler", help="a class, such as LCMScheduler, or JSON of changes of its config (_class_name: the class)")
    add("--timesteps", help="explicit ones instead of --steps, such as 999,749,499,249")
    add("--eta", type=float, help="of DDIMScheduler and TCDScheduler, 0 to 1 (default 0)")
    add("--guidance-scale", type=float, help="of a call that gives none (default 0; 7.5 is usual for SD 1.5)")
    add(
        "--guidance-scales", metavar="G,…", help="for UNets that read it, as an LCM's: those that calls can choose from"
    )
    add("--strengths", metavar="S,…", help="of LCM image-to-image: those that calls can choose")
    add("--clip-skip", type=int, metavar="N", help="draw prompts without the text encoders' last N layers (default 0)")
    add("--stream-batch", type=int, metavar="S", help="frames under way in a stream, 2 to 4 (default 2)")


def _build(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    readers: dict[str, Callable[[str], Any]] = {
        "tasks": lambda value: tuple(name.strip() for name in value.split(",")),
        "sizes": lambda value: tuple(map(console.size_of, value.split(","))),
        "batches": lambda value: _numbers("--batch", value, int),
        "guidance_scales": lambda value: _numbers("--guidance-scales", value, float),
        "strengths": lambda value: _numbers("--strengths", value, float),
        "steps": _steps,
        "scheduler": asked.scheduler_changes,
        "timesteps": _timesteps,
        "chains": lambda value: value.split(","),
        "lora_ranks": lambda value: _numbers("--lora-rank", value, int),
    }
    given |= {name: read(given[name]) for name, read in readers.items() if given[name] is not None}
    given |= {name: given[name] and tuple(given[name]) for name in ("lora", "reference_lora")}
    given |= {kind: asked.named(kind, given[kind]) for kind in KINDS}
    export = recipes.settle(ExportOrder(**{f.name: given[f.name] for f in dataclasses.fields(ExportOrder)}))
    options = backend_options.parse(arguments.O)
    named = ("backend", "device", "target", "timing_cache", "precision", "chains", "engines")
    engine = engine_order(options=options, **{name: given[name] for name in named})
    how = How(path_of(export, arguments.output), arguments.force, verbose=arguments.verbose)
    result = carry_out(BuildOrder(export, engine, how))
    print(json.dumps(dataclasses.asdict(result), default=str, indent=2) if arguments.json else text(result))


def text(result: BuildResult) -> str:
    """Return a summary: a table of checks for each chain, what was done, and the backend."""
    seconds = f" in {sum(p.seconds for p in result.phases):.1f} s"
    if result.checks:
        did = f"built and verified{seconds}" if result.phases else "nothing to do: it is built and verified already"
    else:
        did = f"built{seconds}" if result.phases else "nothing to do: it is built already"
        did += ", unverified: it is checked when it is first loaded on such a machine"
    backend = f"backend {result.backend} ({result.reason}), engine {result.engine}"
    return "\n".join([_tables(result), *quantization.told(result.int8), f"{result.bundle}: {did}", backend])


def _tables(result: BuildResult) -> str:
    """Return a table of figures for each chain, and one for the graphs that are in none."""
    tables: dict[str, list[list[str]]] = {}
    for chain, checks in result.checks.items():
        tables[f"chain {chain}"] = [
            [
                *_graph(result, c.stage),
                f"{c.metric} {value_text(c)}",
                bound_text(c),
                result.remedy.get(c.stage, ""),
            ]
            for c in checks
        ]
    seen = {c.stage for checks in result.checks.values() for c in checks}
    if rest := [name for name in result.precision if name not in seen]:
        tables["other graphs"] = [[*_graph(result, name), "", "", result.remedy[name]] for name in rest]
    head = ["stage", "precision", "engine size", "build time", "error", "bound", "remedy"]
    titled = {title: console.table([head, *rows]) for title, rows in tables.items()}
    return "\n".join(titled.values() if len(titled) == 1 else (f"{t}\n{table}" for t, table in titled.items()))


def _graph(result: BuildResult, name: str) -> list[str]:
    if name not in result.precision:
        return [name, "", "", ""]
    return [
        name,
        result.precision[name],
        console.size(result.engine_bytes[name]),
        f"{result.build_seconds[name]:.1f} s",
    ]


def _numbers(option: str, value: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Return a list's numbers; InputError if one is not a number."""
    try:
        return tuple(map(kind, value.split(",")))
    except ValueError:
        raise InputError(f"{option} {value}: a number was expected, or several, such as 1,4") from None


def _steps(value: str) -> tuple[int, ...]:
    if match := re.fullmatch(r"(\d{1,3})-(\d{1,3})", value):
        return tuple(range(int(match[1]), int(match[2]) + 1))
    if re.fullmatch(r"\d{1,3}(,\d{1,3})*", value):
        return tuple(int(n) for n in value.split(","))
    raise InputError(f"--steps {value}: a range or a list was expected, such as 1-4 or 1,2,4")


def _timesteps(value: str) -> tuple[int, ...]:
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", value):
        return tuple(int(n) for n in value.split(","))
    raise InputError(f"--timesteps {value}: a list was expected, such as 999,749,499,249")


if __name__ == "__main__":
    sys.exit(main())
