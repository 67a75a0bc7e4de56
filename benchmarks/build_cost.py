"""The cost of a bundle with ONNX Runtime on a CPU: build, load and time it; writes results/NAME.json.

    python benchmarks/build_cost.py synthetic:sd-turbo --precision fp32

Each measurement runs in a process of its own. The bundle stays in --keep, else it is removed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cost_tables
import machine
import product
import result
from rows import Build
from turbochain.runtime.commands import console

LIGHT_RUNS = 5

IMPORT = """
import json, time
start = time.perf_counter()
import turbochain.runtime
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "resident_bytes": 1024 * int(status["VmRSS"].split()[0])}))
"""

LOAD = """
import json, sys, threading, time
from turbochain.runtime import Pipeline
def anonymous():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["RssAnon"].split()[0])
peak, loading = 0, True
def watch():
    global peak
    while loading:
        peak = max(peak, anonymous())
        time.sleep(0.005)
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
start = time.perf_counter()
pipe = Pipeline.load(sys.argv[1])
seconds = time.perf_counter() - start
loading = False
watcher.join()
weights = pipe.bundle.open_chain().weight_bytes()
print(json.dumps({"seconds": seconds, "weight_bytes": weights, "peak_rss_anon_bytes": peak}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name; returns the exit status."""
    parser = argparse.ArgumentParser(
        "build_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="synthetic:NAME, demo, a folder in diffusers' format, or a hub id")
    add("--precision", default="fp32")
    add("--size", default="512x512", help="width x height in pixels (default 512x512)")
    add("--runs", type=int, default=5, help="calls that are timed (default 5)")
    add("--steps", nargs="+", default=["1", "4"], help="step counts to time (default 1 4)")
    add("--keep", type=Path, help="folder for the bundle")
    add("--results", type=Path, default=result.FOLDER, help="where the results go")
    return console.run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    width, height = map(int, arguments.size.split("x"))
    run = machine.run()
    with tempfile.TemporaryDirectory(dir=arguments.keep, prefix="build-") as temporary:
        bundle = (arguments.keep or Path(temporary)) / f"build-cost-{arguments.precision}.bundle"
        row = build_row(bundle, arguments)
    found = result.Result(arguments.source, width, height, "cpu", prompt=None, seed=None, runs=(run,), builds=(row,))
    path = arguments.results / machine.file_name(arguments.source, width, height, what=f"{row.precision}-build")
    result.write(found, path)
    print(cost_tables.builds([found]), path, sep="\n")


def build_row(bundle: Path, arguments: argparse.Namespace) -> Build:
    """Build, import, load and time, one after the other."""
    imported = min((script(IMPORT) for _ in range(LIGHT_RUNS)), key=lambda of: of["seconds"])
    built = command(
        "build-engine", arguments.source, "-o", bundle, "--precision", arguments.precision, "--size", arguments.size,
        "--tasks", product.TASK, "--backend", "onnxruntime", "--device", "cpu", "--json",
    )  # fmt: skip
    loaded = script(LOAD, bundle)
    timed = {
        steps: command("turbochain", "bench", bundle, "--steps", steps, "--runs", arguments.runs, "--json")
        for steps in arguments.steps
    }
    return Build(
        precision=arguments.precision,
        build={**built, "bundle": bundle.name, "checks": [check for of in built["checks"].values() for check in of]},
        bench={steps: {**of, "bundle": bundle.name} for steps, of in timed.items()},
        import_seconds=imported["seconds"],
        import_rss_bytes=imported["resident_bytes"],
        load_seconds=loaded["seconds"],
        load_weight_bytes=loaded["weight_bytes"],
        load_peak_rss_anon_bytes=loaded["peak_rss_anon_bytes"],
    )


def command(*arguments: object) -> Any:
    """Run one of the project's commands, and return its JSON."""
    script = Path(sys.executable).with_name(str(arguments[0]))
    line = [str(script), *map(str, arguments[1:])]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def script(source: str, *arguments: object) -> Any:
    """Run Python source in a fresh process, and return its JSON."""
    line = [sys.executable, "-c", source, *map(str, arguments)]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    sys.exit(main())
