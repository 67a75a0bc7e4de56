"""One task, every contender: loaded one after the other, each picture checked, then timed by turns."""

import gc
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from contenders import PIPELINES, Contender, Eager, Loaded, Task
from turbochain.runtime.checks import metrics
from turbochain.runtime.checks.bounds import AT_LEAST, BOUNDS
from turbochain.runtime.commands.bench import timing
from turbochain.runtime.errors import InputError, TurbochainError

OK, WRONG, MISSING, FAILED, LEFT_OUT = "ok", "wrong picture", "missing", "failed", "left out"
"""The status of a row. Only `OK` counts; a wrong picture is timed all the same, and its row says so."""

BOUND = BOUNDS["fp16"]["image"]


@dataclass
class Entry:
    """A pipeline that was loaded, or why it was not."""

    status: str = OK
    reason: str | None = None
    loaded: Loaded | None = None
    load_seconds: float | None = None
    first_image_seconds: float | None = None
    gpu_memory_bytes: int | None = None


@dataclass
class Samples:
    """Milliseconds of one contender."""

    wall: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, loaded: Loaded, wall: float) -> None:
        """The picture that was just drawn."""
        self.wall.append(1e3 * wall)
        gpu = loaded.gpu_seconds()
        self.gpu += [] if gpu is None else [1e3 * gpu]
        for graph, seconds in loaded.stages.items():
            self.stages[graph] += [1e3 * s for s in seconds]

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what there was nothing of."""
        return {
            "wall": asdict(timing(self.wall)) if self.wall else None,
            "gpu": asdict(timing(self.gpu)) if self.gpu else None,
            "stages": {graph: asdict(timing(ms)) for graph, ms in self.stages.items()} or None,
        }


class Contest:
    """The pipelines of one task, loaded. Not loaded are those that nobody wants, or that come after `end`."""

    def __init__(self, task: Task, known: Sequence[Contender], wanted: Sequence[str], end: float) -> None:
        """`end`: of `time.monotonic`. Raises what loading and running diffusers in fp32 raises."""
        self.task, self.known, self.wanted, self.end = task, known, wanted, end
        say("reference: diffusers, eager, fp32")
        self.references = _references(task)
        self.entries: dict[str, Entry] = {}
        for contender in known:
            if contender.name in wanted and contender.pipeline not in self.entries:
                self.entries[contender.pipeline] = self._open(contender.pipeline)

    def _open(self, name: str) -> Entry:
        if time.monotonic() > self.end:
            return Entry(LEFT_OUT, "the time was spent")
        say(f"load {name}")
        loaded = None
        try:
            load = PIPELINES[name](self.task)
            _collect()
            with _Memory(self.task.device) as memory:
                start = time.perf_counter()
                loaded = load()
                ready = time.perf_counter()
                loaded.draw(self.task.steps[0])
                end = time.perf_counter()
            return Entry(OK, None, loaded, ready - start, end - ready, memory.peak_bytes)
        except Exception as error:  # the libraries have no common base class
            if loaded is not None:
                loaded.close()
            _collect()
            return Entry(*_failure(error))

    def cell(self, steps: int, runs: int, warmup: int) -> list[dict[str, Any]]:
        """A row for each contender that is known, whatever became of it."""
        say(f"{self.task.name}, steps {steps}, batch {self.task.batch}")
        rows = {contender: self._row(contender, steps) for contender in self.known}
        samples = {contender: Samples() for contender, row in rows.items() if row["status"] in (OK, WRONG)}
        for i in range(warmup + runs):
            if i > warmup and time.monotonic() > self.end:
                break
            for contender, mine in list(samples.items()):
                try:
                    self._sample(contender, steps, mine if i >= warmup else Samples())
                except Exception as error:
                    rows[contender]["status"], rows[contender]["reason"] = _failure(error)
                    del samples[contender]  # the others go on
        return [row | samples.get(contender, Samples()).to_json() for contender, row in rows.items()]

    def _sample(self, contender: Contender, steps: int, samples: Samples) -> None:
        loaded = self.entries[contender.pipeline].loaded
        assert loaded
        loaded.prepare(contender.mode)
        loaded.stages.clear()
        start = time.perf_counter()
        loaded.draw(steps)
        samples.add(loaded, time.perf_counter() - start)

    def _row(self, contender: Contender, steps: int) -> dict[str, Any]:
        """What is known of a contender before it is timed, its picture checked."""
        entry = self.entries.get(contender.pipeline, Entry())
        if contender.name not in self.wanted:
            entry = Entry(LEFT_OUT, "by --contenders")
        row = {"contender": contender.name, "what": contender.what, "status": entry.status, "reason": entry.reason}
        row |= {"differs": None, "remark": None, "precision": None, "checks": []}
        row |= {k: getattr(entry, k) for k in ("load_seconds", "first_image_seconds", "gpu_memory_bytes")}
        if entry.loaded is None:
            return row
        try:
            entry.loaded.prepare(contender.mode)
            row["checks"] = check(entry.loaded.draw(steps), self.references[steps])
            if contender.mode == "cached":  # that one only filled the cache
                row["checks"] = check(entry.loaded.draw(steps), self.references[steps])
        except Exception as error:
            row["status"], row["reason"] = _failure(error)
            return row
        row |= {
            "precision": entry.loaded.precision,
            "remark": entry.loaded.remark(),
            "differs": self._differs(contender),
        }
        if failed := [c for c in row["checks"] if not c["passed"]]:
            row["status"] = WRONG
            row["reason"] = ", ".join(f"{c['metric']} {c['value']:.3g} (bound {c['bound']:g})" for c in failed)
        return row

    def _differs(self, contender: Contender) -> str | None:
        """What of a contender is not like for like with the first one."""
        first = self.entries.get(self.known[0].pipeline, Entry()).loaded
        loaded = self.entries[contender.pipeline].loaded
        assert loaded
        theirs = first.precision if first else {}
        other = [f"{r} in {p} (eager: {theirs[r]})" for r, p in loaded.precision.items() if theirs.get(r, p) != p]
        return "; ".join([*([contender.differs] if contender.differs else []), *other]) or None

    def close(self) -> None:
        """Give everything back."""
        for entry in self.entries.values():
            if entry.loaded:
                entry.loaded.close()
        self.entries.clear()
        _collect()


def check(picture: np.ndarray, reference: np.ndarray) -> list[dict[str, Any]]:
    """A picture against the reference: a figure for each of the bounds of an fp16 picture."""
    checks = []
    for metric, bound in BOUND.items():
        value = getattr(metrics, metric)(picture, reference)
        passed = value >= bound if metric in AT_LEAST else value <= bound
        checks.append({"metric": metric, "value": value, "bound": bound, "passed": bool(passed)})
    return checks


def say(what: str) -> None:
    """A line of progress."""
    print(what, file=sys.stderr, flush=True)


def _references(task: Task) -> dict[int, np.ndarray]:
    """Step count → what diffusers draws in fp32; TF32 is off, which on a GPU PyTorch uses in convolutions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        eager = Eager(task, torch.float32)
        pictures = {steps: eager.draw(steps) for steps in task.steps}
        eager.close()
    _collect()
    return pictures


def _failure(error: Exception) -> tuple[str, str]:
    """The status and reason of a row."""
    if not isinstance(error, TurbochainError):
        traceback.print_exception(error)
    text = " ".join(str(error).split())[:500]
    said = text if isinstance(error, TurbochainError) else f"{type(error).__name__}: {text}"
    status = MISSING if isinstance(error, InputError) else FAILED
    say(f"  {status}: {said}")
    return status, said


def _collect() -> None:
    """Give back what PyTorch keeps of the GPU's memory for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Memory:
    """How much GPU memory the body took at most; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.device, self.peak_bytes = device, None if device == "cpu" else 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._see()

    def _see(self) -> None:
        self.peak_bytes = max(self.peak_bytes or 0, self._before - self._free())

    def __enter__(self) -> "_Memory":
        if self.peak_bytes is not None:
            self._before = self._free()
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.peak_bytes is not None:
            self._done.set()
            self._watcher.join()
            self._see()
