"""Run the phases of one build, and record what each took, when and with which versions."""

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from turbochain.export.phases.bar import Phase
from turbochain.export.phases.process import JobProcess

LOG = "build.log"
"""What libraries print during a build; removed when it is done."""

SMALL = 2**28
"""Weights, in bytes, up to which all phases share a process: starting one takes longer than its memory is worth."""


@dataclass(frozen=True)
class PhaseReport:
    """What one phase of this build took."""

    name: str
    seconds: float
    peak_bytes: int  # resident memory of its process


@dataclass
class Phases:
    """The phases of one build, run one after the other."""

    lock: int
    log: Path | None
    quiet: bool
    reports: list[PhaseReport]
    _kept: JobProcess | None = None

    def run(self, name: str, job: str, /, *, keep: bool = False, online: bool = False, **arguments: Any) -> Any:
        """Run a job in a process of its own, with a progress bar; see `JobProcess.run`.

        `keep`: in the process that the last phase with `keep` left, for phases whose memory need not be returned.
        `online`: in one that may ask the hub, which is never kept.
        """
        keep = keep and not online
        if not keep:
            self.release()
        with Phase(name, quiet=self.quiet) as phase:
            process = self._kept or JobProcess(self.lock, self.log, online=online)
            self._kept = process if keep else None
            try:
                result, peak = process.run(job, arguments, phase)
            except BaseException:
                self.release()
                raise
            finally:
                if not keep:
                    process.close()
        self.reports.append(PhaseReport(name, phase.seconds, peak))
        return result

    def release(self) -> None:
        """End the process that was kept."""
        kept, self._kept = self._kept, None
        if kept:
            kept.close()


def now() -> str:
    """Return the time: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(*names: str) -> dict[str, str]:
    """Return the installed ones of these distributions and their versions."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
