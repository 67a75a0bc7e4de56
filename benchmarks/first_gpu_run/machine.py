"""Step: what measures."""

from dataclasses import asdict, replace
from pathlib import Path

import machine

from .results import Report, read, update


def run(report: Report, prepared: Path) -> None:
    """Write down machine, GPU, driver, library versions, commit and date, and the clocks as they are found."""
    described = machine.run("cuda", read(report.path).get("commit"))
    update(report.path, "run", value=asdict(replace(described, command="python -m first_gpu_run run")))
    report.add("clocks", machine.clocks("cuda:0"))
