"""The command line of `first_gpu_run`; see the package."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from .results import FILE, Report
from .runner import BUDGET, STEPS, run


def main() -> int:
    """Prepare on a CPU, run on a GPU, or do one step; returns the exit status."""
    parser = argparse.ArgumentParser("first_gpu_run")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write what the run needs, on a machine with all of .venv")
    prepare.add_argument("-o", "--output", type=Path, required=True)
    running = commands.add_parser("run", help=f"run the steps; figures go to {FILE} as they are made")
    running.add_argument("--prepared", type=Path, required=True)
    running.add_argument("-o", "--output", type=Path, required=True)
    running.add_argument("--commit", help="the commit to write down, if git cannot say it")
    running.add_argument("--budget-seconds", type=float, default=BUDGET, help=f"for all steps (default {BUDGET:.0f})")
    running.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these")
    step = commands.add_parser("step", help="one step, in this process; the runner calls it")
    step.add_argument("given", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        importlib.import_module("first_gpu_run.prepare").write(arguments.output)
        return 0
    if arguments.command == "run":
        chosen = [step for step in STEPS if arguments.steps is None or step.name in arguments.steps]
        return int(run(arguments.prepared, arguments.output, arguments.commit, chosen, arguments.budget_seconds) > 0)
    given = arguments.given
    report = Report(Path(given["results"]), given["step"])
    module = importlib.import_module(f"first_gpu_run.{given['module']}")
    module.run(report, Path(given["prepared"]), *given["arguments"])
    sys.stderr.flush()
    os._exit(0)  # after a fault the destructors of a CUDA library would end the process with an error


if __name__ == "__main__":
    sys.exit(main())
