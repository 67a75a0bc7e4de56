"""Run the steps, each in a process of its own with a limit, within one budget of time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .results import FILE, read, update

BUDGET = 720.0  # seconds
LEAST = 5.0  # seconds with which a step is still begun
PATIENCE = 10.0  # seconds in which a step that is killed must be gone; one that waits for the driver may stay
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """A step: the function `run` in the module with its name, or in `module`, with further arguments."""

    name: str
    limit: float  # seconds
    module: str = ""
    arguments: tuple[str, ...] = ()


STEPS = (
    Step("machine", 30),
    Step("functions", 60),
    Step("miniatures", 110),
    Step("fault", 40),
    Step("sd_turbo", 80, "full_size", ("sd-turbo",)),
    Step("sdxl_turbo", 100, "full_size", ("sdxl-turbo",)),
    Step("upsampling", 40),
    Step("inductor_sd", 140, "inductor", ("sd-turbo",)),
    Step("inductor_sdxl", 120, "inductor", ("sdxl-turbo",)),
    Step("onnxruntime", 120),
)
"""In the order of what is to be known first. Their limits are together more than the budget: most end long before."""


def run(prepared: Path, out: Path, commit: str | None, steps: Sequence[Step] = STEPS, budget: float = BUDGET) -> int:
    """Run the steps one after the other; returns how many did not end well. `out` is made; its results are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    path, end, failed = (out / FILE).resolve(), time.monotonic() + budget, 0
    path.unlink(missing_ok=True)
    update(path, "commit", value=commit)
    update(path, "budget_seconds", value=budget)
    with tempfile.TemporaryDirectory() as site, (out / "log.txt").open("w") as log:
        for step in steps:
            limit = min(step.limit, end - time.monotonic())
            begun = limit >= LEAST
            update(path, "steps", step.name, value={"status": "running" if begun else "left out: the time was spent"})
            if begun:
                line = {"module": step.module or step.name, "arguments": step.arguments, "step": step.name}
                given: dict[str, Any] = {"prepared": str(prepared.resolve()), "results": str(path), **line}
                print(f"{step.name}, at most {limit:.0f} s", flush=True)
                start = time.monotonic()
                status = _one(given, limit, _environment(Path(site), out), log)
                update(path, "steps", step.name, "status", value=status)
                update(path, "steps", step.name, "seconds", value=time.monotonic() - start)
            status = read(path)["steps"][step.name]["status"]
            failed += status != "done"
            print(f"{step.name}: {status}", flush=True)
    if (out / "inductor").exists():
        pack(out / "inductor", end - time.monotonic())
    return failed


def pack(folder: Path, limit: float) -> None:
    """Make a folder one file, `….tar.gz`, for a later run with the same PyTorch; after `limit` seconds it is left."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    line = [sys.executable, "-m", "tarfile", "-c", archive.name, folder.name]
    try:
        subprocess.run(line, cwd=folder.parent, timeout=max(limit, 0), check=True)
    except subprocess.SubprocessError as error:
        archive.unlink(missing_ok=True)
        print(f"{folder} stays a folder: {error}", flush=True)
    else:
        shutil.rmtree(folder)


def _one(given: Mapping[str, Any], limit: float, environment: dict[str, str], log: TextIO) -> str:
    """Run one step, and end all of its processes at the limit; returns its status."""
    line = [sys.executable, "-m", "first_gpu_run", "step", json.dumps(given)]
    process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has left running, such as Inductor's workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    if status:
        return f"failed with exit status {status}; log.txt says why"
    found = read(Path(given["results"]))["steps"][given["step"]].get("results", {})
    errors = [name for name, value in found.items() if isinstance(value, dict) and "error" in value]
    return f"done, but this failed: {', '.join(errors)}" if errors else "done"


def _environment(site: Path, out: Path) -> dict[str, str]:
    """Return the environment of a step; turbochain is found in this tree, installed or not."""
    packages = site / "turbochain"
    packages.mkdir(exist_ok=True)
    for name in ("runtime", "export", "engines"):
        if not (packages / name).exists():
            (packages / name).symlink_to(ROOT / name)
    paths = [str(site), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # or the same product may differ in its last bits from run to run
        "TORCHINDUCTOR_CACHE_DIR": str((out / "inductor").resolve()),
        "HF_HUB_OFFLINE": "1",
    }
