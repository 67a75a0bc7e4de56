"""What the phases of one build share: running a job, what it took, and where and when it was made."""

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.engines import worker
from turbochain.engines.progress import Phase

LOG = "build.log"
"""What libraries print during a build; removed when it is done."""


@dataclass(frozen=True)
class PhaseReport:
    """What one phase of this build took."""

    name: str
    seconds: float
    peak_bytes: int  # resident memory of its process


@dataclass
class Session:
    """What every phase of one build needs."""

    lock: int
    log: Path | None
    quiet: bool
    phases: list[PhaseReport]

    def run(self, name: str, job: str, /, **arguments: Any) -> Any:
        """Run a job in a process of its own, with a progress bar; see `worker.run`."""
        with Phase(name, quiet=self.quiet) as phase:
            result, peak = worker.run(job, arguments, progress=phase, lock=self.lock, printed=self.log)
        self.phases.append(PhaseReport(name, phase.seconds, peak))
        return result


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(*names: str) -> dict[str, str]:
    """The installed ones of these distributions and their versions."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
