"""One contender in a process and an environment of its own; `process.py` starts it.

The argument is JSON: what a Contender has ("kind", "precision", "tuned", …), and "source", "variant", "device", "size",
"batch"; of ours "engine", of PyTorch's modules under our executor "bundle", with a rescaled VAE "exponents". Reads a
job per line, {"prompt", "seed", "steps", "save"}, and writes a JSON object per line: first what loading took, then for
each job its seconds, stages and memory. With a job as "once" it does that one and ends. It imports nothing but the
contender's own libraries.
"""

import importlib
import json
import os
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import cpu_peers
import peers

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "openvino",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "openvino-genai",
    "stable-diffusion-cpp-python",
)


def load(spec: dict[str, Any]) -> Any:
    """Load the contender: a drawer as in peers.py."""
    if spec["kind"] in ("ours", "graphed"):  # the only ones that may import turbochain
        product = importlib.import_module("product")
        return product.drawer(spec) if spec["kind"] == "ours" else product.drawer_of_torch(spec)
    return (peers.KINDS | cpu_peers.KINDS)[spec["kind"]](spec)


def main() -> None:
    """Load, then do jobs until the input ends."""
    spec = json.loads(sys.argv[1])
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for a result
    start = time.perf_counter()
    drawer = load(spec)
    loaded = {"load_seconds": time.perf_counter() - start, "versions": versions(), "precision": drawer.precision}
    results.write(json.dumps({**loaded, **memory()}) + "\n")
    for line in sys.stdin if "once" not in spec else [json.dumps(spec["once"])]:
        results.write(json.dumps({**work(drawer, json.loads(line), spec["batch"]), **memory()}) + "\n")


def work(drawer: Any, job: dict[str, Any], batch: int) -> dict[str, Any]:
    """Draw once, and report the seconds."""
    start, busy = time.perf_counter(), time.process_time()
    pictures = drawer.draw([job["prompt"]] * batch, job["seed"], job["steps"])
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    if job.get("save"):
        save(job["save"], pictures)
    more = {"gpu_seconds": drawer.gpu_seconds(), "remark": drawer.remark()}
    return {"seconds": seconds, "cpu_seconds": busy, "stages": drawer.stages, **more}


def save(path: str, pictures: Any) -> None:
    """Write all pictures as .npy, or the first in the format of the file's ending."""
    if path.endswith(".npy"):
        import numpy

        numpy.save(path, pictures)
    else:
        from PIL import Image

        Image.fromarray(pictures[0]).save(path)


def versions() -> dict[str, str]:
    """Return the versions of the peers' packages that are installed here."""
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def memory() -> dict[str, int]:
    """Return this process's peak resident memory, and its present memory that belongs to no file, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_rss_bytes": "VmHWM", "rss_anon_bytes": "RssAnon"}
    return {name: 1024 * int(status[field].split()[0]) for name, field in names.items()}


if __name__ == "__main__":
    main()
