"""The results file: its content, reading, writing and merging. Programs write it, `report.py` and `plot.py` read it.

A file holds what one kind of machine measured of one source and picture size. Every row names the run that it comes
from (a command, with its commit, date, machine and versions).
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rows import Adapted, Batches, BenchmarkRun, Beside, Build, Cold, Compiled, Floor, Growth, Pair, Row, Served, Tried
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.errors import InputError

FOLDER = Path(__file__).parent / "results"

INCLUDES = {
    "seconds": "prompt strings to uint8 pictures [B, H, W, 3] in host memory: tokenising, drawing the noise, every "
    "copy and every stage; without loading, the first picture, warm-up rounds and image encoding",
    "load": "importing the contender's libraries and loading its pipeline, in a fresh process; files are mostly "
    "cached. Building an engine is not part of it",
    "first picture": "the first call after loading, with compilation, tuning and capture",
    "peak_rss_bytes": "VmHWM of the contender's process, from its start to its last picture: mapped files count",
    "rss_anon_bytes": "RssAnon after the last picture: memory that belongs to no file",
    "ratio": "the peer's seconds ÷ ours, one ratio for each round",
    "order": "interleaved: one picture of ours, one of the peer, and again; if a pair is `apart`, the two are loaded "
    "by turns, never both at once, and each time draw their share of the rounds after a first picture and the warm-up",
    "stages": "median seconds of one launch. On a GPU between CUDA events, and only of contenders with +stages, whose "
    "stages are launched one by one",
    "gpu_seconds": "median time between CUDA events before the first and after the last GPU operation of a call; for "
    "diffusers from the start of the call, so that pauses between kernels are included",
    "gpu_memory_bytes": "the largest fall of the GPU's free memory (cudaMemGetInfo, every 5 ms) from before the "
    "process starts to its first picture: its CUDA context and every allocator count",
    "diffusers": "guidance 0 unless the row says another, the default attention and scheduler, a CPU generator; "
    "pictures become uint8 on the device. In fp16 the VAE of SDXL runs in fp32 if its config says force_upcast, as "
    "diffusers does by default",
    "reference": "diffusers, eager, fp32 (without TF32), on the same device: the same checkpoint, prompt, seed and "
    "noise",
    "cold": "from the start of a process to its end, with a PNG on disk: the interpreter, loading (`load`, with the "
    "imports), the first picture (`picture`) and encoding it; files are in the page cache from the run before",
    "growth": "calls of 1 step, 2 steps and so on, interleaved; the slope is that of a straight line through one "
    "round, the ratio that slope ÷ the mean launch of the UNet in the same round",
    "batches": "seconds per picture of a batch, interleaved with one picture alone; the ratio is theirs, round by "
    "round",
    "floors": "per stage the larger of floating-point operations (Conv, MatMul and Gemm of the ONNX graphs; a "
    "multiply-add is two) ÷ this device's rate in a large matrix product (on a CPU also a convolution) of that "
    "precision, by PyTorch, and bytes (weights as stored, inputs, outputs, each once) ÷ its copy bandwidth; summed "
    "over a call's launches. OpenVINO's VAE decoder does 15% fewer operations than the ONNX graph (merged "
    "upsampling), so that it can be below",
    "variants": "speed: seconds of the backend's own way ÷ seconds of the variant, round by round, so that above 1 the"
    " variant is faster; error: relative L2 of the first output against the backend's own in fp32, on the same random"
    " input; load: the graph read, rewritten and compiled, with files in the page cache",
    "builds": "phases: wall-clock seconds and peak resident memory of each phase's process, with its imports; import: "
    "`import turbochain.runtime`, the best of 5 processes; load: Pipeline.load, that is manifest, hashing (stamped "
    "files are not read again), engine and tokenizers, anonymous resident memory sampled every 5 ms; stages: single "
    "launches; end to end: prompt string to uint8 picture in host memory; overhead: the part of it that no stage "
    "accounts for",
    "served": "from the first byte of a request (POST /v1/images/generations) to the last of its answer, over loopback "
    "and a connection that is kept, one client; the picture is noise and is ready at once; echo: a bare uvicorn, with "
    "h11 as the server has, answers with the same bytes; encoding: the JPEG and its base64 in the client's process; "
    "the three are interleaved request by request; own cost: the median of the server less that of the encoding, round "
    "by round",
    "adapted": "UNet: the mean seconds of its launches in a call; rounds alternate between slots that an adapter fills "
    "and no slots; swap: set_adapters, and what the next call then does before its first launch (packing, copying to "
    "the graph's inputs), less the median of a call up to its first launch if no adapter has changed; load: "
    "load_lora_weights, with the file in the page cache; equal bits: whether the latents of a call are the same "
    "whenever the adapters are, in the order first, second, first, none, none",
    "beside": "the mean seconds of the UNet's launches in a call, in two pipelines that draw in turn: a plain one, and "
    "one whose bundle has a ControlNet that the call does not use, or whose weights have an adapter added to them. "
    "MultiHeadAttention: turbochain.mjs in Chromium, one thread, without a call's first launch; the plain UNet is the "
    "bundle's graph, the other the form of it that a site has",
}
"""Name of a figure → what it includes."""


@dataclass(frozen=True)
class Result:
    """A results file."""

    source: str  # synthetic:NAME, a hub id or a folder's name; with " with --vae NAME"
    width: int
    height: int
    device: str  # "cpu", or the GPU's name
    prompt: str | None  # None: nothing was drawn by bench.py
    seed: int | None
    runs: tuple[BenchmarkRun, ...]
    pairs: tuple[Pair, ...] = ()
    floors: tuple[Floor, ...] = ()
    cold: tuple[Cold, ...] = ()
    growth: tuple[Growth, ...] = ()
    batches: tuple[Batches, ...] = ()
    variants: tuple[Tried, ...] = ()
    builds: tuple[Build, ...] = ()
    compiled: tuple[Compiled, ...] = ()
    served: tuple[Served, ...] = ()
    adapted: tuple[Adapted, ...] = ()
    beside: tuple[Beside, ...] = ()
    includes: dict[str, str] = field(default_factory=lambda: dict(INCLUDES))

    def add(self, row: Row) -> "Result":
        """Return the same file with one more row."""
        (kind,) = (kind for kind, (made, _) in KINDS.items() if isinstance(row, made))
        return replace(self, **{kind: (*getattr(self, kind), row)})


KINDS: dict[str, tuple[type[Row], tuple[str, ...]]] = {
    "pairs": (Pair, ("ours", "peer", "batch", "steps", "apart", "task", "guidance_scale", "strength")),
    "floors": (Floor, ("precision", "batch", "steps")),
    "cold": (Cold, ("ours", "peer")),
    "growth": (Growth, ("ours",)),
    "batches": (Batches, ("ours",)),
    "variants": (Tried, ("graph", "variant", "precision")),
    "builds": (Build, ("precision",)),
    "compiled": (Compiled, ("graph", "precision", "architecture")),
    "served": (Served, ("format", "clients")),
    "adapted": (Adapted, ("engine", "graph", "rank")),
    "beside": (Beside, ("change", "engine")),
}
"""Each list in a Result → the type of its rows, and the fields that identify a measurement."""


def read(path: Path) -> Result:
    """Read a results file; BundleError lists everything that is wrong with it."""
    return strict_json.read(Result, path)


def files(folder: Path = FOLDER) -> list[Path]:
    """Return the files in a folder that `read` reads; those of the server's page have content of their own."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("serve-page-"))


def write(result: Result, path: Path) -> None:
    """Write a results file, atomically."""
    write_json(asdict(result), path)


def write_json(content: Any, path: Path) -> None:
    """Write a file of plain values, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def merge(*results: Result) -> Result:
    """Return one result with the rows of all; a later row takes the place of an earlier one with the same key.

    Raises what `check_alike` raises.
    """
    for other in results[1:]:
        check_alike(results[0], other)
    runs: list[BenchmarkRun] = []
    rows: dict[str, dict[tuple[Any, ...], Row]] = {kind: {} for kind in KINDS}
    for result in results:
        for kind, (_, key) in KINDS.items():
            for row in getattr(result, kind):
                rows[kind][tuple(getattr(row, name) for name in key)] = replace(row, run=len(runs) + row.run)
        runs += result.runs
    used = sorted({row.run for of in rows.values() for row in of.values()})
    renumbered: dict[str, Any] = {
        kind: tuple(replace(row, run=used.index(row.run)) for row in of.values()) for kind, of in rows.items()
    }
    return replace(results[0], runs=tuple(runs[i] for i in used), includes=dict(INCLUDES), **renumbered)


def check_alike(one: Result, other: Result) -> None:
    """Raise InputError if two results are of different sources, sizes, devices or kinds of machine."""
    for name in ("source", "width", "height", "device", "prompt", "seed"):
        if getattr(one, name) != getattr(other, name):
            raise InputError(
                f"these results cannot be merged: {name} is {getattr(one, name)!r} in one and {getattr(other, name)!r} "
                "in another; results of one source, size and device were expected; give merge.py only such files"
            )
    kinds = {(r.machine.cpu, r.machine.cores, r.machine.instruction_sets) for r in (*one.runs, *other.runs)}
    if len(kinds) > 1:
        names = " and ".join(sorted(f"{cores} cores of {cpu} ({', '.join(sets)})" for cpu, cores, sets in kinds))
        raise InputError(
            f"these results cannot be merged: they are of {names}; one kind of machine was expected; "
            "keep a file for each"
        )
