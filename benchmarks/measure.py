"""Build a bundle from a source, load it and time it; write benchmarks/results/NAME.json.

    python benchmarks/measure.py synthetic:sd-turbo --precision fp32

The file names the machine, versions, date and what every figure includes. The bundle stays in --keep, else it
is removed. Each measurement runs in a process of its own.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("turbochain", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
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
weights = pipe.bundle.weight_bytes()
after_load = anonymous()
pipe("a cat", seed=0)
print(json.dumps({
    "seconds": seconds, "weight_bytes": weights, "peak_rss_anon_bytes": peak, "ratio": peak / weights,
    "rss_anon_after_load_bytes": after_load, "rss_anon_after_first_image_bytes": anonymous(),
}))
"""


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", nargs="+", default=["1", "4"], help="step counts to time (default 1 4)")
    parser.add_argument("--keep", type=Path, help="folder for the bundle")
    parser.add_argument("--name", help="name of the results file (default: from source and precision)")
    arguments = parser.parse_args()
    name = arguments.name or f"{arguments.source.replace(':', '-').replace('/', '-')}-{arguments.precision}-cpu"
    with tempfile.TemporaryDirectory(dir=arguments.keep, prefix="measure-") as temporary:
        folder = arguments.keep or Path(temporary)
        bundle = folder / f"{name}.bundle"
        result = {
            "what": f"{arguments.source}, {arguments.precision}, {arguments.size}, batch 1",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": {p: metadata.version(p) for p in PACKAGES},
            "includes": {
                "build.phases": "wall-clock seconds and peak resident memory of each phase's process, with its imports",
                "import": f"`import turbochain.runtime` and resident memory after it; best of {LIGHT_RUNS} processes",
                "load": "Pipeline.load: manifest, hashing (stamped files are not read again), engine and tokenizers; "
                "anonymous resident memory sampled every 5 ms",
                "bench": "see its own `includes`; stages are single launches",
            },
            "import": min((script(IMPORT) for _ in range(LIGHT_RUNS)), key=lambda r: r["seconds"]),
            "build": command(
                "build-engine", arguments.source, "-o", bundle, "--precision", arguments.precision,
                "--size", arguments.size, "--backend", "onnxruntime", "--device", "cpu", "--json",
            ),
            "load": script(LOAD, bundle),
            "bench": {
                steps: command("turbochain", "bench", bundle, "--steps", steps, "--runs", arguments.runs, "--json")
                for steps in arguments.steps
            },
        }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps(result, indent=1).replace(str(bundle), bundle.name)
    path.write_text(text + "\n")
    print(path)


def commit() -> str:
    """The commit of this tree, marked where it was changed since."""
    if not shutil.which("git"):
        return "unknown"
    line = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(line, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = dict(re.findall(r"^(\S.*?)\s*: (.*)$", info.split("\n\n")[0], re.M))
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "instruction_sets": [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "note": "a shared virtual machine: absolute times vary, compare ratios within one run",
    }


def cpu_kind() -> str:
    """This CPU's newest instructions that matter here, for a file's name: results of other CPUs are kept beside it."""
    return [platform.machine(), *machine()["instruction_sets"]][-1].replace("_", "-")


def command(*arguments: object) -> Any:
    """Run one of the project's commands and read its JSON."""
    script = Path(sys.executable).with_name(str(arguments[0]))
    line = [str(script), *map(str, arguments[1:])]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def script(source: str, *arguments: object) -> Any:
    """Run Python source in a fresh process and read its JSON."""
    line = [sys.executable, "-c", source, *map(str, arguments)]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
