"""What else a machine does while contenders draw: time that a hypervisor takes, other processes, the clock.

The clock is what the system says: a guest may see nothing but the nominal one.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rows import Noise

STAT, CPUINFO = Path("/proc/stat"), Path("/proc/cpuinfo")
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reading:
    """The counters of all cores together, in seconds, and their mean clock."""

    busy: float
    idle: float
    steal: float
    mhz: float | None


def read() -> Reading:
    """Read the counters; see proc_stat(5). The time of guests is in that of user and nice."""
    fields = STAT.read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, idle, iowait, irq, softirq, steal = (int(value) * TICK for value in fields)
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*: (.*)$", CPUINFO.read_text(), re.M)]
    return Reading(
        user + nice + system + irq + softirq, idle + iowait, steal, float(np.mean(clocks)) if clocks else None
    )


def between(before: Reading, after: Reading, own: float) -> Noise:
    """Return what happened meanwhile; `own`: the seconds that the contenders' threads worked."""
    busy, steal = after.busy - before.busy, after.steal - before.steal
    whole = busy + steal + after.idle - before.idle
    mhz = None if before.mhz is None or after.mhz is None else (before.mhz, after.mhz)
    return Noise(steal / whole, max(0.0, busy - own) / whole, mhz)
