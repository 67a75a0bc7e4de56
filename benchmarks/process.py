"""A contender's process, seen from the benchmark."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from contenders import Contender
from turbochain.runtime.commands.bench import PROMPT

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".bench"  # make bench-setup puts the peers' here
SEED = 0
LIMIT = 1200.0  # seconds for loading, or for a picture: torch.compile has been seen to hang


class ContenderError(RuntimeError):
    """A contender is missing, or failed; the message is the reason in its row."""


class Process:
    """A contender, loaded in a process of its own; a context manager that ends it."""

    def __init__(
        self,
        contender: Contender,
        source: Path,
        *,
        size: tuple[int, int],
        batch: int = 1,
        device: str = "cpu",
        **more: Any,
    ) -> None:
        """Start it and wait until it is loaded; ContenderError if that fails.

        `source`: a bundle (ours) or a checkpoint's folder. `size`: width, height. `more`: "engine" of ours, the
        checkpoint's "variant", or "once", a job after which the process ends.
        """
        python = Path(sys.executable)
        if contender.environment:
            python = ENVIRONMENTS / contender.environment / "bin/python"
        if not python.exists():
            raise ContenderError(f"missing: {contender.environment} is not installed (make bench-setup)")
        given = {"source": str(source), "size": size, "batch": batch, "device": device, "variant": None, **more}
        self.log = source.with_name(f"{contender.name}.log")
        self._memory = GpuMemory(device)
        with self.log.open("w") as log:
            line = [str(python), str(HERE / "worker.py"), json.dumps({**asdict(contender), **given})]
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            self.loaded = self.read()
        except BaseException:
            self.close()
            raise

    def draw(self, steps: int, save: Path | None = None) -> dict[str, Any]:
        """Draw once and return its seconds, stages and memory; ContenderError if that fails."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(job(steps, save)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says why
        answer = self.read()
        self._memory.stop()
        return {**answer, "gpu_memory_bytes": self._memory.peak_bytes}

    def read(self) -> dict[str, Any]:
        """Return its next line; ContenderError with the end of its log if there is none."""
        assert self.process.stdout
        patience = threading.Timer(LIMIT, self.process.kill)
        patience.start()
        line = self.process.stdout.readline()
        in_time = patience.is_alive()
        patience.cancel()
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        if not in_time:
            raise ContenderError(f"failed: no answer within {LIMIT:g} s")
        last = self.log.read_text().strip().splitlines()[-1:]
        raise ContenderError(f"failed: {' '.join(last)[:300] or 'the process ended'}")

    def close(self) -> None:
        """End the process."""
        self._memory.stop()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def job(steps: int, save: Path | None) -> dict[str, Any]:
    """Return one line for a worker."""
    return {"prompt": PROMPT, "seed": SEED, "steps": steps, "save": save and str(save)}


class GpuMemory:
    """A watch on a GPU's free memory, from outside the contender's process; idle on a CPU."""

    def __init__(self, device: str) -> None:
        self.peak_bytes: int | None = None
        self._done = threading.Event()
        if device == "cpu":
            self._done.set()
            return
        import torch

        self._free = lambda: torch.cuda.mem_get_info(device)[0]
        self._before = self._free()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes or 0, self._before - self._free())

    def stop(self) -> None:
        """Take the last sample, once."""
        if not self._done.is_set():
            self._done.set()
            self._watcher.join()
            self._sample()
