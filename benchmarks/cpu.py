"""Compare our engines with the peers on this CPU, pair by pair, A B A B; write benchmarks/results/NAME-cpu-KIND.json.

    python benchmarks/cpu.py synthetic:sd-turbo
    python benchmarks/cpu.py synthetic:sd-turbo-mini --size 64x64 --runs 2 --pairs openvino-bf16:eager-fp32

Each contender is a process of its own, in its own environment, loaded for its pair and asked for one picture after the
other's; with `--apart` loaded anew for every picture, so that only one of them is in memory. Its picture is compared
with eager fp32's before its time counts. A peer whose environment is missing has a row that says so (`make
bench-setup`).
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import cpu_rows
import cpu_text
import floor
import plot_cpu
from contenders import checkpoint
from measure import PACKAGES, commit, cpu_kind, machine
from peers import ENGINES, OWN_VAE, SEED, Worker, job, precision, with_vae
from turbochain.engines import build
from turbochain.export.phases.phases import versions
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import Bundle, TurbochainError
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.commands import console
from turbochain.runtime.commands.bench import PROMPT

HERE = Path(__file__).parent
FOLDER, RESULTS = HERE.parent / ".bench", HERE / "results"
PAIRS = (
    "openvino-bf16:eager-bf16-channels-last",
    "openvino-bf16:eager-fp32",
    "openvino-fp32:eager-fp32",
    "onnxruntime-fp32:eager-fp32",
    "openvino-int8:eager-bf16-channels-last",
    "openvino-fp32-vae-int8:eager-fp32",
    "openvino-bf16:optimum-intel-bf16",
    "openvino-fp32:optimum-intel-fp32",
    "openvino-fp32:optimum-onnx",
    "onnxruntime-fp32:optimum-onnx",
    "openvino-bf16:compiled-bf16",
    "openvino-fp32:compiled-fp32",
)
FAILURES = (RuntimeError, TurbochainError)
"""What becomes a row's reason: a contender that fails, an engine of ours that cannot be built here."""
COLD = ("onnxruntime-fp32:eager-fp32", "openvino-fp32:eager-fp32", "openvino-bf16:eager-bf16-channels-last")


class Bench:
    """One checkpoint and shape, with everything that is built for it."""

    def __init__(
        self,
        source: str,
        vae: str | None,
        folder: Path,
        size: tuple[int, int],
        batch: int,
        steps: int,
        runs: int,
        apart: bool = False,
    ) -> None:
        self.size, self.batch, self.steps, self.runs, self.apart = size, batch, steps, runs, apart
        self.folder = folder
        self.own = self.checkpoint = checkpoint(source, folder)
        if vae is not None:
            self.checkpoint = with_vae(self.own, source, vae, folder)
        self.name = self.checkpoint.folder.name
        self.engines: dict[tuple[str, int], str] = {}
        self.references: dict[Path, Path] = {}

    def bundle(self, batch: int) -> Path:
        """Where ours is."""
        return self.folder / f"{self.name}-{self.size[0]}x{self.size[1]}-b{batch}.bundle"

    def reference(self, of: Checkpoint) -> np.ndarray:
        """What diffusers, eager, fp32 makes of a checkpoint."""
        if of.folder not in self.references:
            say(f"reference: diffusers, eager, fp32, {of.folder.name}")
            self.references[of.folder] = path = self.folder / f"reference-{of.folder.name}.npy"
            with Worker("eager-fp32", of.folder, self.size, self.batch, variant=of.variant) as worker:
                worker.draw(self.steps, path)
        return np.load(self.references[of.folder])

    def of(self, name: str) -> Checkpoint:
        """The checkpoint that a contender draws with: with OWN_VAE in its name the one without `--vae`."""
        return self.own if name.endswith(OWN_VAE) else self.checkpoint

    def engine(self, name: str, batch: int) -> str:
        """Ours, built."""
        if (name, batch) not in self.engines:
            bundle = self.bundle(batch)
            first = not bundle.exists()
            # A larger batch is built even where memory looks too small: what fails is a row with its reason.
            steps = {} if batch == self.batch else {"steps": [self.steps], "force": True}
            shape = {"size": self.size, "batch": batch, "precision": "fp32", **steps} if first else {}
            source = str(self.checkpoint.folder if first else bundle)
            made = build(source, bundle, device="cpu", **ENGINES[name], **shape)  # type: ignore[arg-type]
            self.engines[name, batch] = made.engine
        return self.engines[name, batch]

    def start(self, name: str, batch: int | None = None, **more: Any) -> Worker:
        """A contender, loaded; our engine is built first."""
        batch = self.batch if batch is None else batch
        if name in ENGINES:
            return Worker(self.engine(name, batch), self.bundle(batch), self.size, batch, **more)
        given = self.of(name)
        return Worker(name.removesuffix(OWN_VAE), given.folder, self.size, batch, variant=given.variant, **more)

    def pair(self, ours: str, peer: str) -> dict[str, Any]:
        """Both, by turns."""
        say(f"{ours} : {peer}")
        precisions = precision(ours), precision(peer)
        differs = None if precisions[0] == precisions[1] else f"{precisions[0]} against {precisions[1]}"
        if peer.endswith(OWN_VAE):
            differs = "; ".join(filter(None, (differs, "the peer decodes with the checkpoint's own VAE")))
        result: dict[str, Any] = {"ours": ours, "peer": peer, "apart": self.apart, "differs": differs, "reason": None}
        try:
            for name in (ours, peer):  # now, while no contender is in memory
                if name in ENGINES:
                    self.engine(name, self.batch)
                self.reference(self.of(name))
            rows = (self._loaded_anew if self.apart else self._loaded_together)(ours, peer)
        except FAILURES as error:
            say(f"  {error}")
            return {**result, "reason": str(error)}
        wrong = [name for name, row in zip((ours, peer), rows, strict=True) if not row["checks"]["passed"]]
        return {**result, "reason": "; ".join(f"wrong picture: {n}" for n in wrong) or None, **cpu_rows.summary(*rows)}

    def _loaded_together(self, ours: str, peer: str) -> list[dict[str, Any]]:
        with self.start(ours) as a, self.start(peer) as b:
            rows = [self._first(worker, name) for worker, name in ((a, ours), (b, peer))]
            for _ in range(self.runs):
                for worker, row in zip((a, b), rows, strict=True):
                    row["drawn"].append(worker.draw(self.steps))
        return rows

    def _loaded_anew(self, ours: str, peer: str) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for _ in range(self.runs):
            for name in (ours, peer):
                with self.start(name) as worker:
                    row = rows.setdefault(name, self._first(worker, name))
                    row["drawn"].append(worker.draw(self.steps))
        return list(rows.values())

    def cold(self, ours: str, peer: str) -> dict[str, Any]:
        """From the start of a process to a PNG on disk and its end, by turns."""
        say(f"cold start, {ours} : {peer}")
        taken: dict[str, list[dict[str, float]]] = {ours: [], peer: []}
        result: dict[str, Any] = {"ours": ours, "peer": peer, "reason": None}
        try:
            self._take_cold(taken)
        except FAILURES as error:
            say(f"  {error}")
            return {**result, "reason": str(error)}
        ratios = [b["whole"] / a["whole"] for a, b in zip(*taken.values(), strict=True)]
        medians = {n: {k: float(np.median([t[k] for t in of])) for k in of[0]} for n, of in taken.items()}
        return {**result, "ratio": cpu_rows.spread(np.array(ratios)), "seconds": medians}

    def _take_cold(self, taken: dict[str, list[dict[str, float]]]) -> None:
        for turn in range(1 + self.runs):  # the first builds what is missing, and brings files into the page cache
            for name, of in taken.items():
                start = time.perf_counter()
                with self.start(name, once=job(self.steps, self.folder / "cold.png")) as worker:
                    drawn = worker.read()
                    worker.process.wait()
                whole = time.perf_counter() - start
                if turn:
                    of.append({"whole": whole, "load": worker.loaded["load_seconds"], "picture": drawn["seconds"]})

    def growth(self, ours: str) -> dict[str, Any]:
        """How the time grows with the steps, beside the UNet's own time."""
        counts = Bundle.open(self.bundle(self.batch)).steps
        say(f"{ours}: steps {', '.join(map(str, counts))}")
        drawn: dict[int, list[dict[str, Any]]] = {steps: [] for steps in counts}
        with self.start(ours) as worker:
            worker.draw(counts[-1])
            for _ in range(self.runs):
                for steps, of in drawn.items():
                    of.append(worker.draw(steps))
        seconds = np.array([[d["seconds"] for d in of] for of in drawn.values()])  # [steps, rounds]
        unet = np.array(
            [np.mean([s for of in drawn.values() for s in of[i]["stages"]["unet"]]) for i in range(self.runs)]
        )
        slopes = np.polyfit(counts, seconds, 1)[0]
        return {
            "ours": ours,
            "seconds": dict(zip(counts, np.median(seconds, 1).tolist(), strict=True)),
            "slope_seconds": float(np.median(slopes)),
            "unet_seconds": float(np.median(unet)),
            "ratio": cpu_rows.spread(slopes / unet),
        }

    def floor(self, dtype: str) -> dict[str, Any]:
        """The floor of one picture on this machine, by stage."""
        say(f"the machine's matrix rate in {dtype} and copy bandwidth")
        ceilings = floor.ceilings("cpu", dtype)
        bundle = Bundle.open(self.bundle(self.batch))
        return {"ceilings": asdict(ceilings), **floor.of(bundle, self.steps, ceilings)}

    def batches(self, ours: str, counts: Sequence[int]) -> dict[str, Any]:
        """What a picture costs in larger batches, each by turns with one picture alone."""
        alone: list[float] = []
        seconds, ratios, reasons = {}, {}, {}
        for count in counts:
            say(f"{ours}: batch {count}")
            try:
                each = self._by_turns(ours, count) / (self.batch, count)
            except FAILURES as error:
                say(f"  {error}")
                reasons[count] = str(error)
                continue
            alone += list(each[:, 0])
            seconds[count], ratios[count] = float(np.median(each[:, 1])), cpu_rows.spread(each[:, 1] / each[:, 0])
        if alone:
            seconds = {self.batch: float(np.median(alone)), **seconds}
        return {"ours": ours, "seconds": seconds, "ratio": ratios, "reasons": reasons}

    def _by_turns(self, ours: str, count: int) -> np.ndarray:
        """[runs, 2]: the seconds of this batch and of a batch of `count`."""
        with self.start(ours) as one, self.start(ours, count) as many:
            for worker in (one, many):
                worker.draw(self.steps)
            return np.array([[w.draw(self.steps)["seconds"] for w in (one, many)] for _ in range(self.runs)])

    def _first(self, worker: Worker, name: str) -> dict[str, Any]:
        picture = self.folder / "picture.npy"
        first = worker.draw(self.steps, picture)
        checks = cpu_rows.check(np.load(picture), self.reference(self.of(name)), precision(name))
        return {"loaded": worker.loaded, "first": first, "checks": checks, "drawn": []}


def say(what: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="synthetic:NAME, demo, a folder in diffusers' format, or a hub id")
    add("--vae", help="with this VAE instead of the checkpoint's own, as in build-engine: tiny, a hub id or a folder")
    add("--size", type=lambda text: tuple(map(int, text.split("x"))), default=(512, 512), help="width x height")
    add("--batch", type=int, default=1)
    add("--steps", type=int, default=1)
    add("--runs", type=int, default=5, help="pictures of each contender of a pair that count (default 5)")
    add("--pairs", nargs="*", default=PAIRS, metavar="OURS:PEER", help=f"default: {' '.join(PAIRS)}")
    add("--cold", nargs="*", default=COLD, metavar="OURS:PEER", help=f"cold starts; default: {' '.join(COLD)}")
    add(
        "--batches", type=int, nargs="*", default=(2, 4, 8), help="pictures in a batch, besides --batch (default 2 4 8)"
    )
    add("--apart", action="store_true", help="load the two of a pair anew for every picture, never both at once")
    add("--folder", type=Path, default=FOLDER, help="where checkpoints and bundles are kept")
    add("--results", type=Path, default=RESULTS, help="where the results go")
    return console.run(parser, _bench, argv)


def _bench(arguments: argparse.Namespace) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    width, height = arguments.size
    vae = f" with --vae {arguments.vae}" if arguments.vae else ""
    result: dict[str, Any] = {
        "what": f"{arguments.source}{vae}, {width}x{height}, batch {arguments.batch}, steps {arguments.steps}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(*PACKAGES, "openvino"),
        "includes": cpu_text.INCLUDES,
        "prompt": PROMPT,
        "seed": SEED,
        "pairs": [],
        "floors": {},
        "steps": [],
        "cold": [],
        "batches": [],
    }
    name = re.sub(r"[^a-z0-9]+", "-", result["what"].lower())
    shape = (arguments.size, arguments.batch, arguments.steps, arguments.runs, arguments.apart)
    bench = Bench(arguments.source, arguments.vae, arguments.folder, *shape)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{name}-cpu-{cpu_kind()}.json"

    def keep(part: str, found: dict[str, Any]) -> None:  # what is measured stays, if the rest is interrupted
        result[part].append(found)
        write_atomically(path, json.dumps(result, indent=1) + "\n")

    for pair in arguments.pairs:
        keep("pairs", bench.pair(*pair.split(":")))
    drawn = [pair["ours"] for pair in result["pairs"] if "of" in pair]
    # Only of what drew here: without instructions for it, a product in bf16 takes minutes.
    result["floors"] = {p: bench.floor(p) for p in sorted({*map(precision, drawn)} & {"fp32", "bf16"})}
    for pair in arguments.cold:
        keep("cold", bench.cold(*pair.split(":")))
    for ours in drawn[:1]:
        keep("steps", bench.growth(ours))
        if arguments.batches:
            keep("batches", bench.batches(ours, arguments.batches))
    plot_cpu.draw(result, path.with_suffix(".png"))
    print(cpu_text.text(result))


if __name__ == "__main__":
    sys.exit(main())
