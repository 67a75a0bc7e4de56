"""What a measurement on a GPU depends on: the device, its driver and clocks, the libraries, the commit, the command."""

import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from measure import PACKAGES, commit, machine
from turbochain.export.phases.phases import versions
from turbochain.runtime import backends

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def describe(device: str) -> dict[str, Any]:
    """Everything that is needed to repeat a run, but for what the run itself adds."""
    libraries = [name for backend in backends.names() for name in backends.get(backend).LIBRARIES]
    host = machine()
    del host["note"]  # it is about another machine
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "machine": host,
        "gpu": _gpu(device),
        "versions": {
            **versions(*dict.fromkeys((*PACKAGES, "triton", "cuda-bindings", *libraries))),
            "torch": torch.__version__,  # with what it was built for
        },
    }


def gpu_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def clocks(device: str) -> dict[str, str] | None:
    """Clocks, power and temperature at this moment, as nvidia-smi has them; None without it."""
    return None if device == "cpu" else _smi(device, *CLOCKS)


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": (_smi(device, "driver_version") or {}).get("driver_version"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "clocks": clocks(device),
    }


def _smi(device: str, *fields: str) -> dict[str, str] | None:
    if not shutil.which("nvidia-smi"):
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its numbers may be others than CUDA's
    line = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(line, capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else None
