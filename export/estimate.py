"""Estimate what a build will need, from parameter counts and configs, before the work starts.

The factors are fitted to the peaks in benchmarks/results/ and rounded up.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbochain.export.chains import Placed
from turbochain.export.families import Shape, decoder_channels
from turbochain.runtime.commands import console
from turbochain.runtime.errors import InputError

GiB = 2**30
_BASE = 0.9 * GiB  # the libraries themselves
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_REFERENCE = 1.15  # × all weights in fp32
_EXPORT = 1.2  # × a component's weights in its precision, while it is traced and folded
_ENGINE = {"fp32": 1.15, "fp16": 2.5, "bf16": 2.5}  # × weights: ONNX Runtime's CPU provider casts fp16 to fp32
_ACTIVATIONS = 9  # × the decoder's widest tensor
_SLOTS = 0.00125  # × a component's weights: the values of its slots for adapters, for each rank
_SLOT_COPIES = 3  # as they are given, cut, and cast
_SCORES = 2  # × the largest attention's scores, which ONNX Runtime keeps whole


@dataclass(frozen=True)
class Needs:
    """Expected peaks in bytes."""

    memory: dict[str, float]  # phase → resident memory
    disk: float  # beside the bundle, at the highest point


def needs(
    graphs: Mapping[str, Placed],
    configs: Mapping[str, Any],
    counts: Mapping[str, int],
    precisions: Mapping[str, str],
    fetched: float,
) -> Needs:
    """Return what a build needs. `counts`: component → values in its weights; `precisions`: graph → the one asked for.

    `fetched`: bytes to download or draw first.
    """
    specs = {name: graph.spec for name, graph in graphs.items() if graph.spec.component}
    weights = {name: counts[s.component] * _BYTES[precisions[name]] for name, s in specs.items()}
    stored = {(s.component, precisions[name]): weights[name] for name, s in specs.items()}  # shared by its graphs
    shapes = {graph.shape for graph in graphs.values()}
    activations = _ACTIVATIONS * max(_widest(configs, shape) for shape in shapes)
    loaded: dict[tuple[str, str], float] = {}  # of graphs with role and weights in common, one at a time
    for name, s in specs.items():
        slots = _SLOT_COPIES * 4 * _SLOTS * s.rank * counts[s.component]
        role = (s.role, precisions[name])
        loaded[role] = max(loaded.get(role, 0), weights[name] * _ENGINE[precisions[name]] + slots)
    scores = _SCORES * max(_scores(configs, shape) for shape in shapes)
    memory = {
        "reference": _BASE + _REFERENCE * 4 * sum(counts.values()) + activations,
        "export": _BASE + _EXPORT * max(weights.values()),
        "verify": _BASE / 3 + sum(loaded.values()) + activations + scores,
    }
    return Needs(memory, disk=fetched + 1.02 * sum(stored.values()))


def require(needs: Needs, folder: Path, force: bool) -> None:
    """Raise InputError if this machine has too little memory, or the disk of `folder` too little room."""
    if force:
        return
    problems = []
    phase, memory = max(needs.memory.items(), key=lambda item: item[1])
    if memory > (free := free_memory()):
        problems.append(
            f"the phase {phase} needs about {console.size(memory)} of memory, and {console.size(free)} are free"
        )
    if needs.disk > (free := shutil.disk_usage(folder).free):
        problems.append(f"the build needs about {console.size(needs.disk)} of disk, and {console.size(free)} are free")
    if problems:
        raise InputError(f"this machine has too little room: {'; '.join(problems)}; --force tries all the same")


def free_memory() -> float:
    """Return the bytes that the kernel and the control group (in a container) leave for a new process."""
    free = float("inf")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" if there is none
        used = int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cache["file"]))
    except (OSError, ValueError, KeyError):
        pass
    return free


def _widest(configs: Mapping[str, Any], shape: Shape) -> float:
    """Return the bytes of the decoder's largest tensor: the input of its last block, fp32 at full resolution."""
    channels = decoder_channels(configs["vae"])
    return 4.0 * channels[min(1, len(channels) - 1)] * shape.height * shape.width * shape.batch


def _scores(configs: Mapping[str, Any], shape: Shape) -> float:
    """Return the bytes of the largest Q·Kᵀ in fp32, heads · pixels², among the UNet's levels with attention and the
    VAE."""
    unet, pixels = configs["unet"], shape.height * shape.width / 64
    heads = unet["attention_head_dim"]  # diffusers' name for the number of heads
    heads = heads if isinstance(heads, list | tuple) else [heads] * len(unet["down_block_types"])
    levels = [
        count * (pixels / 4**i) ** 2
        for i, (count, block) in enumerate(zip(heads, unet["down_block_types"], strict=True))
        if "Attn" in block
    ]
    return 4.0 * shape.batch * max([pixels**2, *levels])
