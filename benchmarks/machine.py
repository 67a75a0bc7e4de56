"""Describe a run: machine, GPU, driver, clocks, libraries, commit, command."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from rows import BenchmarkRun, Gpu, Machine
from turbochain.export.phases.phases import versions

HERE = Path(__file__).parent
PACKAGES = (
    "turbochain", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt", "tensorrt-rtx-cu13", "triton", "cuda-bindings", "numpy",
)  # fmt: skip
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


def run(device: str = "cpu", known_commit: str | None = None, packages: tuple[str, ...] = PACKAGES) -> BenchmarkRun:
    """Describe this command: everything that is needed to repeat it; `packages`: those whose versions matter."""
    return BenchmarkRun(
        commit=known_commit or commit(),
        machine=machine(),
        versions=versions(*packages),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        gpu=None if device == "cpu" else gpu(device),
    )


def commit() -> str:
    """Return the commit of this tree, with "-dirty" if a tracked file has changed since; "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    line = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(line, cwd=HERE, capture_output=True, text=True).stdout.strip() or "unknown"


def machine() -> Machine:
    """Describe the host."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = dict(re.findall(r"^(\S.*?)\s*: (.*)$", info.split("\n\n")[0], re.M))
    flags = cpu.get("flags", "").split()
    return Machine(
        cpu=cpu.get("model name", platform.processor()),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        instruction_sets=tuple(f for f in INSTRUCTION_SETS if f in flags),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def device_name(device: str) -> str:
    """Return "cpu", or the GPU's name."""
    return "cpu" if device == "cpu" else gpu(device).name


def kind(device: str = "cpu") -> str:
    """Return the device as part of a file's name: the GPU, or the CPU's newest instructions that matter here."""
    if device != "cpu":
        return device_name(device)
    return "cpu-" + [platform.machine(), *machine().instruction_sets][-1]


def file_name(source: str, width: int, height: int, device: str = "cpu", what: str = "") -> str:
    """Return the name of the results file of a source and size on this machine; `what` sets another kind apart."""
    words = [source, f"{width}x{height}", what, kind(device)]
    slugs = (re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words if word)
    return "-".join(slugs) + ".json"


def gpu(device: str) -> Gpu:
    """Describe a GPU."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        driver=_smi(device, "driver_version").get("driver_version"),
        cuda=str(torch.version.cuda),
        cudnn=torch.backends.cudnn.version(),
    )


def clocks(device: str) -> dict[str, str]:
    """Return the GPU's clocks, power and temperature now, as nvidia-smi has them; empty on a CPU or without it."""
    return {} if device == "cpu" else _smi(device, *CLOCKS)


def _smi(device: str, *names: str) -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        return {}
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # nvidia-smi may number the GPUs in another order
    line = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(line, capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if done.returncode == 0 and len(values) == len(names) else {}
