"""The results of a run: one JSON file, written whole again after every figure, so that a crash loses only the next one.

{"run": what measured (rows.BenchmarkRun), "commit", "budget_seconds",
 "steps": {step: {"status", "seconds", "results": {…}}}}
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "first-gpu-run.json"


def read(path: Path) -> dict[str, Any]:
    """Return the content of the file; empty if there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def update(path: Path, *keys: str, value: Any) -> None:
    """Set one value, found by its keys from the top; what lies on the way is made. The file is replaced in one go."""
    whole = found = read(path)
    for key in keys[:-1]:
        found = found.setdefault(key, {})
    found[keys[-1]] = _plain(value)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    """Return the value as JSON can say it: five digits of a float, NaN as text."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


class Report:
    """What a step writes its figures to."""

    def __init__(self, path: Path, step: str) -> None:
        self.path, self.step = path, step

    def add(self, name: str, value: Any) -> None:
        """Write a figure down at once."""
        update(self.path, "steps", self.step, "results", name, value=value)
        print(f"{time.strftime('%H:%M:%S')} {self.step}, {name}: {value}", file=sys.stderr, flush=True)

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Write down what `work` returns, or its error; the step goes on with the next. Returns it, or None."""
        start = time.perf_counter()
        try:
            value = work()
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"[:500]
            self.add(name, {"error": said, "after_seconds": time.perf_counter() - start})
            return None
        self.add(name, value)
        return value
