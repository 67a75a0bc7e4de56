"""Phases on stderr: a bar with elapsed time on a terminal, a line at the start and at the end elsewhere."""

import sys
import threading
import time
from typing import TextIO

_WIDTH = 24


class Phase:
    """A phase that is running. Use as a context manager; call it with (done, total) as work goes on."""

    def __init__(self, name: str, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.name = name
        self.seconds = 0.0
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = self._stream.isatty() and not quiet
        self._done, self._total = 0, 0
        self._stop = threading.Event()

    def __call__(self, done: int, total: int) -> None:
        """Say how much is done."""
        self._done, self._total = done, total

    def __enter__(self) -> "Phase":
        self._start = time.perf_counter()
        if not self._live and not self._quiet:
            print(f"{self.name} …", file=self._stream, flush=True)
        if self._live:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        if self._live:
            self._ticker.join()
            self._stream.write("\r\x1b[K")
        if not self._quiet:
            end = "done" if kind is None else "cancelled" if kind is KeyboardInterrupt else "failed"
            self._stream.write(f"{self.name:<32} {end:>9} {self.seconds:8.1f} s\n")
            self._stream.flush()

    def _tick(self) -> None:
        while not self._stop.wait(0.1):
            self._stream.write("\r\x1b[K" + self._line())
            self._stream.flush()

    def _line(self) -> str:
        elapsed = time.perf_counter() - self._start
        if not self._total:  # no telling how much there is: something moves
            at = int(4 * elapsed) % _WIDTH
            return f"{self.name:<32} [{'-' * at}#{'-' * (_WIDTH - at - 1)}]      {elapsed:8.1f} s"
        filled = _WIDTH * min(self._done, self._total) // self._total
        share = 100 * self._done // self._total
        return f"{self.name:<32} [{'#' * filled}{'-' * (_WIDTH - filled)}] {share:3d}% {elapsed:8.1f} s"
