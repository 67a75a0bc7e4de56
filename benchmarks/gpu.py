"""Compare every way of making a picture on this GPU, by turns in one process; write benchmarks/results/NAME.json.

    python benchmarks/gpu.py                    # SD-Turbo and SDXL-Turbo, 512x512, steps 1 2 4, batches 1 and 4
    python benchmarks/gpu.py --source synthetic:sd-turbo --steps 1 --batch 1 --contenders eager tensorrt
    python benchmarks/gpu.py --device cpu --source synthetic:sd-turbo-mini --size 64x64    # tries the harness

Every contender's picture is compared with eager fp32 on the same device before its time counts. After each cell (step
count and batch) the file is written; a later command of the same day adds its cells to it, or takes their place.
Checkpoints, bundles and compiled kernels stay in --folder, so an interrupted command does not begin anew.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import floor
import report
from turbochain.runtime import Bundle
from turbochain.runtime.backends import cuda
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.commands import console
from turbochain.runtime.commands.bench import PROMPT
from turbochain.runtime.errors import InputError, NoGpu

SOURCES = ["synthetic:sd-turbo", "synthetic:sdxl-turbo"]
FOLDER = Path(__file__).parents[1] / ".gpu" / "bench"
RESULTS = Path(__file__).parent / "results"
ELSEWHERE = "run it where PyTorch has CUDA: make bench-gpu BIN=DIRECTORY (with turbochain and diffusers for its python)"
INCLUDES = {
    "wall": "prompt strings to uint8 pictures [B, H, W, 3] in host memory: tokenising, drawing the noise on the CPU, "
    "every copy and every stage; without loading, the first picture (compilation, tuning, capture) and the warm-up",
    "gpu": "between CUDA events before the first and after the last of the call's work on the GPU; of the diffusers "
    "contenders from the start of the call, so that the host's pauses between kernels are part of it",
    "stages": "CUDA events around each launch (on a CPU wall clock)",
    "load": "weights and engines from disk to the device; without building the engine",
    "first image": "the first call after loading: with compilation, tuning and capture",
    "gpu_memory_bytes": "the most by which the GPU's free memory (cudaMemGetInfo) fell from before loading to after "
    "the first picture, sampled every 5 ms: every allocator counts, and what other processes take meanwhile; it is of "
    "the pipeline, whichever of its contenders the row is of",
    "diffusers": "guidance 0, the default attention and scheduler, a CPU generator; SDXL's VAE goes to fp32 and back "
    "at each call where its config says force_upcast, as diffusers does by default (compiled: once, when loaded, and "
    "UNet and VAE channels last); the conversion to uint8 is on the device, which is quicker than diffusers' own",
    "reference": "diffusers, eager, fp32 without TF32, on the same device, with the same prompt, seed and noise",
    "order": "one sample of each contender by turns, in the order of the rows",
    "floor": floor.HOW,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(
        "bench-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", nargs="+", default=SOURCES, help="synthetic:NAME, a folder in diffusers' format, or a hub id")
    add("--device", default="cuda", help="cuda, cuda:N, or cpu to try the harness")
    add("--size", type=size, default=(512, 512), help="width x height in pixels (default 512x512)")
    add("--steps", nargs="+", type=int, default=[1, 2, 4])
    add("--batch", nargs="+", type=int, default=[1, 4])
    add("--contenders", nargs="+", help="only these; the others' rows say that they were left out")
    add("--runs", type=int, default=50, help="samples of each contender (default 50)")
    add("--warmup", type=int, default=5, help="samples of each that do not count (default 5)")
    add("--budget-seconds", type=float, default=float("inf"), help="begin nothing after this time")
    add("--folder", type=Path, default=FOLDER, help="where checkpoints, bundles and kernels are kept")
    add("--commit", help="what to write as this tree's commit, where git cannot say it")
    add("--results", type=Path, default=RESULTS, help="where the results and their plot go")
    return console.run(parser, _bench, argv)


def size(text: str) -> tuple[int, int]:
    """512x512 → width, height."""
    width, height = map(int, text.split("x"))
    return width, height


def _bench(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.budget_seconds
    _check_device(arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    # Kernels that were tuned once are found again by the next command.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(arguments.folder.resolve() / "inductor"))

    import contenders
    import environment
    from contest import Contest, say

    known = contenders.CPU if arguments.device == "cpu" else contenders.GPU
    wanted = arguments.contenders or [c.name for c in known]
    if unknown := set(wanted) - {c.name for c in known}:
        raise InputError(f"--contenders {min(unknown)}: choose from {', '.join(c.name for c in known)}")
    say("the device's matrix rate and copy bandwidth")
    ceilings = floor.ceilings(arguments.device)
    run = environment.describe(arguments.device) | {
        "ceilings": asdict(ceilings),
        "prompt": PROMPT,
        "seed": contenders.SEED,
        "warmup": arguments.warmup,
        **({"commit": arguments.commit} if arguments.commit else {}),
    }
    for source in arguments.source:
        checkpoint = contenders.checkpoint(source, arguments.folder)
        source = Path(source).resolve().name if Path(source).is_dir() else source
        results = Results(arguments.results, source, environment.gpu_name(arguments.device), run)
        for batch in arguments.batch:
            task = contenders.Task(
                checkpoint=checkpoint,
                name=re.split("[:/]", source)[-1],
                folder=arguments.folder,
                device=arguments.device,
                size=arguments.size,
                batch=batch,
                steps=tuple(arguments.steps),
                precision="fp32" if arguments.device == "cpu" else "fp16",
            )
            if time.monotonic() > end:
                say(f"not measured, because the time was spent: {source}, batch {batch}")
                continue
            contest = Contest(task, known, wanted, end)
            for steps in arguments.steps:
                if time.monotonic() > end:
                    say(f"not measured, because the time was spent: {source}, batch {batch}, steps {steps}")
                    continue
                before = environment.clocks(arguments.device)
                rows = contest.cell(steps, arguments.runs, arguments.warmup)
                after = environment.clocks(arguments.device)
                cell = _cell(task, steps, rows, ceilings) | {"clocks": {"before": before, "after": after}}
                if _has_bars(task, steps):
                    cell["bars"] = bars(checkpoint.family.name, results.data["gpu"], rows)
                print(results.add(cell))
            contest.close()


def _check_device(device: str) -> None:
    """InputError where PyTorch has no such GPU, with what is in the way."""
    if device == "cpu":
        return
    try:
        import torch
    except ModuleNotFoundError:
        raise InputError(f"PyTorch is not installed for {sys.executable}; {ELSEWHERE}") from None
    if not torch.cuda.is_available():
        try:
            cuda.find(device)
        except NoGpu as error:
            raise NoGpu(f"this measures an NVIDIA GPU, and {error}") from None
        raise InputError(f"PyTorch {torch.__version__} cannot use the GPU here; {ELSEWHERE}")
    torch.cuda.set_device(torch.device(device).index or 0)


def _cell(task: Any, steps: int, rows: list[dict[str, Any]], ceilings: floor.Ceilings) -> dict[str, Any]:
    """What goes into the file: the rows, with the floor beside each."""
    bundle = Bundle.open(task.bundle) if task.bundle.exists() else None
    least = floor.of(bundle, steps, ceilings) if bundle else None
    for row in rows:
        row["floor_ms"] = least and least["cached_ms" if row["contender"].endswith("-cached") else "ms"]
        row["over_floor"] = row["wall"] and least and row["wall"]["p50_ms"] / row["floor_ms"]
    width, height = task.size
    cell = {"steps": steps, "batch": task.batch, "width": width, "height": height, "precision": task.precision}
    return cell | {"floor": least, "rows": rows, "bars": []}


BARS = {"gpu": "H200", "ms": {"sdxl": 14.0, "sd": 9.5}, "times_faster": 5.0}
"""What our chain must reach with one step, batch 1, 512×512: wall clock p50, and against eager fp16."""


def _has_bars(task: Any, steps: int) -> bool:
    full_size = task.checkpoint.configs["unet"]["block_out_channels"][0] == 320
    return full_size and (steps, task.batch, task.size) == (1, 1, (512, 512))


def bars(family: str, gpu: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar and what was reached; `passed` is None where a row that it needs does not count."""
    p50 = {row["contender"]: row["wall"]["p50_ms"] for row in rows if row["status"] == "ok"}
    ours = next((name for name in ("tensorrt", "onnxruntime") if name in p50), None)
    faster = p50["eager"] / p50[ours] if ours and "eager" in p50 else None
    most, least = BARS["ms"][family], BARS["times_faster"]
    against = {"what": "times faster than eager, at least", "contender": ours, "bound": least, "value": faster}
    found = [against | {"passed": faster and faster >= least}]
    if BARS["gpu"] in gpu:
        value = ours and p50[ours]
        found.append(
            {"what": "wall clock p50 in ms, at most", "contender": ours, "bound": most, "value": value}
            | {"passed": value and value <= most}
        )
    return found


class Results:
    """The file of one source on one GPU and day; runs and cells of earlier commands stay, but for cells done again."""

    def __init__(self, folder: Path, source: str, gpu: str, run: dict[str, Any]) -> None:
        date = datetime.now(UTC).date().isoformat()
        words = (re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in (source, gpu))
        self.path = folder / f"{'-'.join(words)}-{date}.json"
        self.data = {"source": source, "gpu": gpu, "date": date, "includes": INCLUDES, "runs": [], "cells": []}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        self.run = len(self.data["runs"])
        self.data["runs"].append(run)

    def add(self, cell: dict[str, Any]) -> str:
        """Write the file and its plot with one more cell; returns the cell as text."""
        key = ("width", "height", "precision", "batch", "steps")
        others = [c for c in self.data["cells"] if [c[k] for k in key] != [cell[k] for k in key]]
        self.data["cells"] = sorted([*others, {**cell, "run": self.run}], key=lambda c: [c[k] for k in key])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.data, indent=1) + "\n")
        try:
            import plot
        except ModuleNotFoundError as error:
            print(f"no plot, because {error.name} is not installed", file=sys.stderr)
        else:
            plot.draw(self.data, self.path.with_suffix(".png"))
        return f"{self.data['source']}, {report.cell_text(cell)}\n{self.path}\n"


if __name__ == "__main__":
    sys.exit(main())
