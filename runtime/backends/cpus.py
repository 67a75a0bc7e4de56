"""How many CPUs this process may use, by its affinity and its control groups' quotas, and whether they have VNNI."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path

GROUPS, OWN, INFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/cpuinfo")


def allowed() -> int:
    """Return how many CPUs the process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def quota(groups: Path = GROUPS, own: Path = OWN) -> int | None:
    """Return how many CPUs' time the process may take, rounded up; None if nothing limits it.

    A container limits its processes so. The file `own` names the process's groups, and `groups` is where they are.
    """
    limits = list(_quotas(groups, own))
    return ceil(min(limits)) if limits else None


def available() -> int:
    """Return how many threads can work at once, at least 1."""
    return min(allowed(), quota() or sys.maxsize)


def has_vnni(info: Path = INFO) -> bool:
    """Return whether products of bytes are summed in 32 bits; False if that is not known.

    An x86 CPU without such an instruction sums two of them in 16 bits, which 255 · 127 + 255 · 127 overflows.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                yield from _limits(groups, path, "cpu.max")
            elif "cpu" in controllers.split(","):
                yield from _limits(groups / "cpu", path, "cpu.cfs_quota_us", "cpu.cfs_period_us")


def _limits(root: Path, path: str, *files: str) -> Iterator[float]:
    """Yield the quota of a group and those of the groups that it is in; a container may see only the last, as root."""
    inner = root / path.strip("/")
    for folder in (inner, *inner.parents):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            time, period = (float(word) for file in files for word in (folder / file).read_text().split())
            if time > 0:
                yield time / period
        if folder == root:
            return
