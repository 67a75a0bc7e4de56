"""Compare our engines with the peers on this machine, pair by pair, interleaved A B A B; writes results/NAME.json.

    python benchmarks/bench.py synthetic:sd-turbo
    python benchmarks/bench.py synthetic:sd-turbo --device cuda --steps 1 --batch 1 --pairs tensorrt-fp16:eager-fp16
    python benchmarks/bench.py synthetic:sd-turbo-mini --size 64x64 --runs 2 --pairs openvino-fp32:eager-fp32

Each contender is a process of its own, in its own environment. Its picture is compared with eager fp32's before its
time counts. A peer whose environment is missing has a row that says so (`make bench-setup`). The file is written
after each measurement, and a later command adds its rows to it. benchmarks/README.md says what the figures include.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import contenders
import machine
import plot
import result
import tables
from measure import Measure, Settings
from process import SEED
from result import Result
from rows import Row
from turbochain.runtime.backends import cuda
from turbochain.runtime.commands import console
from turbochain.runtime.commands.bench import PROMPT
from turbochain.runtime.errors import InputError, NoGpu
from workload import Workload

FOLDER = Path(__file__).parents[1] / ".bench"
ELSEWHERE = "run it where PyTorch has CUDA: make bench-gpu BIN=DIRECTORY (with turbochain and diffusers for its python)"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="+", help="synthetic:NAME, demo, a folder in diffusers' format, or a hub id")
    add("--vae", help="with this VAE instead of the checkpoint's own, as in build-engine: tiny, a hub id or a folder")
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--size", type=size, default=(512, 512), help="width x height in pixels (default 512x512)")
    add("--task", default="text-to-image", help="text-to-image (default) or image-to-image")
    add("--guidance-scale", type=float, default=0.0, help="of every call (default 0: none)")
    add("--strength", type=float, help="of image-to-image")
    add("--steps", type=int, nargs="+", help="step counts of the pairs (default 1; on a GPU 1 2 4)")
    add("--batch", type=int, nargs="+", help="batches of the pairs (default 1; on a GPU 1 4)")
    add("--runs", type=int, help="rounds of a pair that count (default 7; on a GPU 50)")
    add(
        "--most-runs",
        type=int,
        help="make more until the interval of the ratio's median is within 5 percent of it, up to so many (default: "
        "what --runs says, or 21 on a CPU)",
    )
    add("--warmup", type=int, help="rounds before them (default 0; on a GPU 5)")
    add("--pairs", nargs="*", metavar="OURS:PEER", help="the pairs (default: see benchmarks/README.md)")
    add("--cold", nargs="*", metavar="OURS:PEER", help="pairs of cold starts (default: see benchmarks/README.md)")
    add("--batches", type=int, nargs="*", help="larger batches of the first of ours (default 2 4 8; on a GPU none)")
    add(
        "--turns",
        type=int,
        metavar="N",
        help="load the two contenders of a pair in turn, N times each, never both (on a GPU: 2)",
    )
    add("--budget-seconds", type=float, default=float("inf"), help="begin nothing after this time")
    add("--commit", help="the commit to write down, if git cannot say it")
    add("--folder", type=Path, default=FOLDER, help="where checkpoints, bundles and kernels are kept")
    add("--results", type=Path, default=result.FOLDER, help="where the results and their plot go")
    return console.run(parser, _bench, argv)


def size(text: str) -> tuple[int, int]:
    """Return width and height of a text such as 512x512."""
    width, height = map(int, text.split("x"))
    return width, height


def check_pair(text: str) -> None:
    """Raise InputError if a text is not OURS:PEER, two contenders."""
    names = text.split(":")
    if len(names) != 2:
        raise InputError(f"{text!r} is not a pair: OURS:PEER was expected, such as {contenders.CPU.pairs[0]}")
    for name in names:
        contenders.find(name)


def _bench(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.budget_seconds
    check_device(arguments.device)
    defaults = contenders.defaults(arguments.device)
    if arguments.most_runs is None and arguments.runs is not None:
        arguments.most_runs = arguments.runs
    for name in ("pairs", "cold", "steps", "batch", "batches", "runs", "most_runs", "warmup", "turns"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(defaults, name))
    for pair in (*arguments.pairs, *arguments.cold):
        check_pair(pair)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    # Kernels that torch.compile tuned once are found by the next command.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(arguments.folder.resolve() / "inductor"))
    for source in arguments.source:
        settings = Settings(
            source=source,
            vae=arguments.vae,
            folder=arguments.folder,
            device=arguments.device,
            size=arguments.size,
            steps=tuple(arguments.steps),
            runs=arguments.runs,
            most=arguments.most_runs,
            warmup=arguments.warmup,
            turns=arguments.turns,
            end=end,
            workload=Workload(arguments.task, arguments.guidance_scale, arguments.strength),
        )
        kept = Kept(settings, arguments.results, arguments.commit)
        measure(settings, arguments, kept)
        plot.draw(kept.whole, kept.path.with_suffix(".png"))
        print(tables.pairs(kept.mine), kept.path, sep="\n")


def measure(settings: Settings, arguments: argparse.Namespace, kept: "Kept") -> None:
    """Measure one source: pairs, floors, cold starts, growth with the steps, larger batches."""
    bench = Measure(settings)
    for batch in arguments.batch:
        for pair in arguments.pairs:
            for row in bench.pair(*pair.split(":"), batch):
                kept.add(row)
    drawn = [pair for pair in kept.mine.pairs if pair.our_figures and contenders.find(pair.ours).ours]
    drawn = drawn if settings.workload.plain else []  # of other calls there are pairs alone
    precisions = {contenders.find(pair.ours).precision for pair in drawn}
    # Only of what drew here: a CPU without instructions for bf16 takes minutes for one product in it.
    for precision in contenders.defaults(settings.device).floors:
        shapes = {(pair.batch, pair.steps): pair.ours for pair in drawn} if precision in precisions else {}
        for (batch, steps), ours in shapes.items():
            kept.add(bench.floor(precision, ours, batch, steps))
    for pair in arguments.cold:
        kept.add(bench.cold(*pair.split(":")))
    if drawn and settings.device == "cpu":
        kept.add(bench.growth(drawn[0].ours, drawn[0].batch))
    if drawn and arguments.batches:
        kept.add(bench.batches(drawn[0].ours, drawn[0].batch, arguments.batches))


class Kept:
    """The results file of one source on this machine, written after each row; an earlier command's rows stay in it."""

    def __init__(self, settings: Settings, folder: Path, commit: str | None) -> None:
        name = Path(settings.source).resolve().name if Path(settings.source).is_dir() else settings.source
        source = f"{name} with --vae {settings.vae}" if settings.vae else name
        width, height = settings.size
        self.path = folder / machine.file_name(source, width, height, settings.device)
        self.before = result.read(self.path) if self.path.exists() else None
        self.mine = Result(
            source=source,
            width=width,
            height=height,
            device=machine.device_name(settings.device),
            prompt=PROMPT,
            seed=SEED,
            runs=(machine.run(settings.device, commit),),
        )
        if self.before:
            result.check_alike(self.before, self.mine)  # before anything is measured

    def add(self, row: Row) -> None:
        """Write the file with one more row."""
        self.mine = self.mine.add(row)
        result.write(self.whole, self.path)

    @property
    def whole(self) -> Result:
        """Return the file's content: this command's rows, and those of earlier commands."""
        return result.merge(self.before, self.mine) if self.before else self.mine


def check_device(device: str) -> None:
    """Raise InputError if PyTorch cannot use this device, with the reason."""
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


if __name__ == "__main__":
    sys.exit(main())
