"""Measuring: pairs, cold starts, growth with the steps, batches and floors of one checkpoint on one device."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import contenders
import figures
import floor
import machine
import noise
import product
from contenders import Contender
from figures import Samples, spread
from process import Process, job
from rows import Batches, Cold, ColdStart, Floor, Growth, Noise, Pair
from turbochain.runtime.errors import TurbochainError
from workload import PLAIN, Workload

FAILURES = (RuntimeError, TurbochainError)
"""Errors that become a row's reason: a contender fails or is missing, or an engine of ours cannot be built here."""
FEW_STEPS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Settings:
    """The source, the shape and the rounds."""

    source: str
    vae: str | None
    folder: Path  # of checkpoints, bundles and logs
    device: str  # "cpu", "cuda" or "cuda:N"
    size: tuple[int, int]  # width, height
    steps: tuple[int, ...]
    runs: int  # rounds that count
    most: int = 0  # further rounds are made up to so many, until the ratio's interval is narrow; 0: none
    warmup: int = 0  # rounds before them
    turns: int | None = None  # load the two contenders of a pair in turn, that often each; None: both at once
    end: float = float("inf")  # time.monotonic() after which nothing is begun
    workload: Workload = PLAIN


class Measure:
    """One checkpoint with everything that is built for it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own = self.checkpoint = product.checkpoint(settings.source, settings.folder)
        if settings.vae is not None:
            self.checkpoint = product.with_vae(self.own, settings.source, settings.vae, settings.folder)
        self._engines: dict[tuple[str, int], str] = {}
        self._references: dict[tuple[Path, int, int], np.ndarray] = {}
        self._ceilings: dict[str, Any] = {}

    def pair(self, ours: str, peer: str, batch: int) -> Iterator[Pair]:
        """Measure two contenders, interleaved; yields one row for each step count, whatever happens."""
        say(f"{ours} : {peer}, batch {batch}")
        rows = [
            Pair(
                **{"ours": ours, "peer": peer, "batch": batch, "steps": n, "apart": self.settings.turns is not None},
                **self.settings.workload.spec,
            )
            for n in self.settings.steps
        ]
        done = 0
        try:
            self._check_time()
            names = (contenders.find(ours), contenders.find(peer))
            for contender in names:  # now, while no contender is in memory
                self._prepare(contender, batch)
                self._reference(contender, batch, self.settings.steps[0])
            measure = self._together if self.settings.turns is None else self._by_turns
            before = machine.clocks(self.settings.device)
            for row, (samples, meanwhile) in zip(rows, measure(names, batch), strict=True):
                after = machine.clocks(self.settings.device)
                clocks = {"before": before, "after": after} if after else {}
                yield replace(self._row(row, names, samples), clocks=clocks, noise=meanwhile)
                done, before = done + 1, after
        except FAILURES as error:
            say(f"  {error}")
            yield from (replace(row, reason=str(error)) for row in rows[done:])

    def _together(self, pair: Sequence[Contender], batch: int) -> Iterator[tuple[list[Samples], Noise | None]]:
        """Load both, then draw by one and the other; yields for each step count their samples, and on a CPU what else
        the machine did."""
        counts = self.settings.steps
        with contextlib.ExitStack() as stack:
            processes, firsts = [], []
            for contender in pair:  # the first picture before the next one is loaded: its GPU memory is measured
                processes.append(stack.enter_context(self.start(contender, batch)))
                firsts.append(self._first(processes[-1], contender, batch, counts[0]))
            for steps in counts:
                self._check_time()
                samples = firsts
                if steps != counts[0]:
                    samples = [
                        self._next(first, process, contender, batch, steps)
                        for process, contender, first in zip(processes, pair, firsts, strict=True)
                    ]
                for process in self.settings.warmup * processes:
                    process.draw(steps)
                before = noise.read() if self.settings.device == "cpu" else None
                while not self._settled(samples):
                    for process, of in zip(processes, samples, strict=True):
                        of.drawn.append(process.draw(steps))
                busy = sum(drawn["cpu_seconds"] for of in samples for drawn in of.drawn)
                yield samples, noise.between(before, noise.read(), busy) if before else None

    def _settled(self, samples: Sequence[Samples]) -> bool:
        """Return whether there are enough rounds, and either no more are allowed or the ratio is known well."""
        ours, peer = samples
        if len(peer.drawn) < self.settings.runs:
            return False
        return len(peer.drawn) >= self.settings.most or figures.is_narrow(spread(peer.seconds / ours.seconds))

    def _by_turns(self, pair: Sequence[Contender], batch: int) -> Iterator[tuple[list[Samples], None]]:
        """Load one, draw its share of the rounds, end it, then the other, and again; yields as `_together`."""
        counts, turns = self.settings.steps, self.settings.turns or 1
        shares = [self.settings.runs * (i + 1) // turns - self.settings.runs * i // turns for i in range(turns)]
        found: dict[tuple[str, int], Samples] = {}
        for share in filter(None, shares):
            for contender in pair:
                self._check_time()
                with self.start(contender, batch) as process:
                    first = self._first(process, contender, batch, counts[0])
                    for steps in counts:
                        of = first if steps == counts[0] else self._next(first, process, contender, batch, steps)
                        for _ in range(self.settings.warmup):
                            process.draw(steps)
                        drawn = [process.draw(steps) for _ in range(share)]
                        found.setdefault((contender.name, steps), of).drawn.extend(drawn)
        for steps in counts:
            yield [found[contender.name, steps] for contender in pair], None

    def _next(self, first: Samples, process: Process, contender: Contender, batch: int, steps: int) -> Samples:
        """Return the samples of a further step count, after its first picture."""
        return replace(first, check=self._first(process, contender, batch, steps).check, drawn=[])

    def _row(self, row: Pair, pair: Sequence[Contender], samples: Sequence[Samples]) -> Pair:
        precision = figures.differs(pair[0].precision, pair[1].precision, [s.loaded["precision"] for s in samples])
        differs = [precision, *(contender.differs for contender in pair)]
        ours, peer = samples
        wrong = [c.name for c, of in zip(pair, samples, strict=True) if not of.check.passed]
        if not figures.is_short(self.settings.workload, row.steps):
            wrong = [] if figures.is_as_good(ours.check, peer.check) else [pair[0].name]
        return replace(
            row,
            differs="; ".join(filter(None, differs)) or None,
            reason="; ".join(f"wrong picture: {name}" for name in wrong) or None,
            ratio=spread(peer.seconds / ours.seconds),
            our_figures=ours.figures(),
            peer_figures=peer.figures(),
        )

    def cold(self, ours: str, peer: str) -> Cold:
        """Measure from the start of a process to a PNG on disk and its end, interleaved."""
        say(f"cold start, {ours} : {peer}")
        taken: dict[str, list[ColdStart]] = {ours: [], peer: []}
        row = Cold(ours=ours, peer=peer)
        try:
            for turn in range(1 + self.settings.runs):  # the first brings files into the page cache
                for name, of in taken.items():
                    self._check_time()
                    once = self._cold_start(contenders.find(name))
                    of += [once] if turn else []
        except FAILURES as error:
            say(f"  {error}")
            return replace(row, reason=str(error))
        return replace(
            row,
            ratio=spread([theirs.whole / mine.whole for mine, theirs in zip(taken[ours], taken[peer], strict=True)]),
            seconds={name: _medians(of) for name, of in taken.items()},
        )

    def _cold_start(self, contender: Contender) -> ColdStart:
        self._prepare(contender, 1)
        once = job(self.settings.steps[0], self.settings.folder / "cold.png")
        start = time.perf_counter()
        with self.start(contender, 1, once=once) as process:
            drawn = process.read()
            process.process.wait()
            whole = time.perf_counter() - start
            return ColdStart(whole, process.loaded["load_seconds"], drawn["seconds"])

    def growth(self, ours: str, batch: int) -> Growth:
        """Measure how the time grows with the steps, beside the UNet's own time."""
        contender = contenders.find(ours)
        counts = product.step_counts(self._bundle(contender, batch))
        say(f"{ours}: steps {', '.join(map(str, counts))}")
        rounds = []
        with self.start(contender, batch) as process:
            process.draw(counts[-1])
            for _ in range(self.settings.runs):
                rounds.append([process.draw(steps) for steps in counts])
        seconds = np.array([[drawn["seconds"] for drawn in of] for of in rounds])  # [rounds, steps]
        unet = np.array([np.mean([s for drawn in of for s in drawn["stages"]["unet"]]) for of in rounds])
        slopes = np.polyfit(counts, seconds.T, 1)[0]
        return Growth(
            ours=ours,
            seconds={str(n): float(median) for n, median in zip(counts, np.median(seconds, 0), strict=True)},
            slope_seconds=float(np.median(slopes)),
            unet_seconds=float(np.median(unet)),
            ratio=spread(slopes / unet),
        )

    def batches(self, ours: str, batch: int, counts: Sequence[int]) -> Batches:
        """Measure the time per picture in larger batches, each interleaved with a batch of `batch`."""
        contender, steps = contenders.find(ours), self.settings.steps[0]
        row, alone = Batches(ours=ours, seconds={}, ratio={}, reasons={}), []
        for count in counts:
            say(f"{ours}: batch {count}")
            try:
                self._check_time()
                self._prepare(contender, count, counts=())
                with self.start(contender, batch) as one, self.start(contender, count) as many:
                    drawn = [[p.draw(steps)["seconds"] for p in (one, many)] for _ in range(1 + self.settings.runs)]
            except FAILURES as error:
                say(f"  {error}")
                row.reasons[str(count)] = str(error)
                continue
            each = np.array(drawn[1:]) / (batch, count)  # [rounds, 2]: seconds per picture
            alone += list(each[:, 0])
            row.seconds[str(count)] = float(np.median(each[:, 1]))
            row.ratio[str(count)] = spread(each[:, 1] / each[:, 0])
        known = {str(batch): float(np.median(alone))} if alone else {}
        return replace(row, seconds={**known, **row.seconds})

    def floor(self, precision: str, ours: str, batch: int, steps: int) -> Floor:
        """Return the floor of one call on this device; its matrix rate and copy bandwidth are measured once."""
        if precision not in self._ceilings:
            say(f"the device's matrix rate in {precision}, and its copy bandwidth")
            self._ceilings[precision] = floor.ceilings(self.settings.device, precision)
        stages = product.stages(self._bundle(contenders.find(ours), batch), steps)
        return floor.of(stages, self._ceilings[precision], precision=precision, batch=batch, steps=steps)

    def start(self, contender: Contender, batch: int, **more: Any) -> Process:
        """Start a contender's process; its engine and bundle are there."""
        where: dict[str, Any] = {"size": self.settings.size, "batch": batch, "device": self.settings.device, **more}
        where["workload"] = self.settings.workload.spec
        if contender.ours:
            engine = self._engines[contender.base, batch]
            return Process(contender, self._bundle(contender, batch), engine=engine, **where)
        given = self.own if contender.own_vae else self.checkpoint
        if contender.kind == "graphed":
            where["bundle"] = str(self._bundle(contender, batch))
        if contender.vae == "rescaled":
            where["exponents"] = product.vae_exponents(self._bundle(contender, batch))
        return Process(contender, given.folder, variant=given.variant, **where)

    def _bundle(self, contender: Contender, batch: int) -> Path:
        width, height = self.settings.size
        called = "" if self.settings.workload.plain else f"-{re.sub('[^a-z0-9.]+', '-', self.settings.workload.text)}"
        name = f"{self.checkpoint.folder.name}-{width}x{height}-b{batch}-{contender.bundle_precision}{called}.bundle"
        return self.settings.folder / name

    def _prepare(self, contender: Contender, batch: int, counts: Sequence[int] = FEW_STEPS) -> None:
        """Make what a contender is loaded from, once: an engine of ours, or the bundle alone that a peer reads.

        A bundle has tables for `counts`, if the call is plain, and the steps asked for.
        """
        counts = counts if self.settings.workload.plain else ()
        if contender.vae and not product.upcasts(self.checkpoint):
            raise RuntimeError("left out: diffusers runs this VAE in fp16 as it is")
        shape: dict[str, Any] = {
            "precision": contender.bundle_precision,
            "size": self.settings.size,
            "batch": batch,
            "steps": sorted({*counts, *self.settings.steps}),
        }
        if contender.kind == "graphed" or contender.vae == "rescaled":
            product.export(self.checkpoint, self._bundle(contender, batch), **shape)
        if contender.ours and (contender.base, batch) not in self._engines:
            self._engines[contender.base, batch] = product.build(
                self.checkpoint,
                self._bundle(contender, batch),
                backend=contender.backend,
                options=contender.options,
                device=self.settings.device,
                workload=self.settings.workload,
                **shape,
            )

    def _reference(self, contender: Contender, batch: int, steps: int) -> np.ndarray:
        """Return the pictures of diffusers, eager, fp32 with a contender's checkpoint."""
        given = self.own if contender.own_vae else self.checkpoint
        if (given.folder, batch, steps) not in self._references:
            say(f"reference: diffusers, eager, fp32, {given.folder.name}, batch {batch}")
            reference = replace(contenders.REFERENCE, own_vae=contender.own_vae)
            path = self.settings.folder / "reference.npy"
            with self.start(reference, batch) as process:
                for each in self.settings.steps:
                    process.draw(each, path)
                    self._references[given.folder, batch, each] = np.load(path)
        return self._references[given.folder, batch, steps]

    def _first(self, process: Process, contender: Contender, batch: int, steps: int) -> Samples:
        """Draw the first picture, and compare it with the reference."""
        path = self.settings.folder / "picture.npy"
        first = process.draw(steps, path)
        if contender.mode == "cached":  # the first one has filled the cache
            process.draw(steps, path)
        reference = self._reference(contender, batch, steps)
        check = figures.check(np.load(path), reference, contender.precision, contender.truncates)
        return Samples(process.loaded, first, check)

    def _check_time(self) -> None:
        if time.monotonic() > self.settings.end:
            raise RuntimeError("left out: the time was spent")


def _medians(of: Sequence[ColdStart]) -> ColdStart:
    return ColdStart(*(float(np.median([getattr(c, name) for c in of])) for name in ("whole", "load", "picture")))


def say(what: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
