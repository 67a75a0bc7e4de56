"""The contenders of benchmarks/cpu.py, and the processes that they run in."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from turbochain.export.sources import Want, find, parts
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.runtime.commands.bench import PROMPT

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".bench"  # where `make bench-setup` puts those of the peers
SEED = 0
LIMIT = 1200.0  # seconds for loading, or for a picture: torch.compile has been seen to hang
ENGINES = {
    "openvino-bf16": {"backend": "openvino", "options": {"inference_precision": "bf16"}},
    "openvino-fp32": {"backend": "openvino", "options": {"inference_precision": "fp32"}},
    "openvino-int8": {"backend": "openvino", "options": {"inference_precision": "bf16", "vae_int8": True}},
    "openvino-fp32-vae-int8": {"backend": "openvino", "options": {"inference_precision": "fp32", "vae_int8": True}},
    "onnxruntime-fp32": {"backend": "onnxruntime"},
}
"""Our contenders: what their engine is built with."""
OWN_VAE = "+own-vae"  # at the end of a peer's name: with the checkpoint's own VAE, where the others have `--vae`
PEERS = {
    "eager-fp32": ("", "fp32"),
    "eager-bf16": ("", "bf16"),
    "eager-bf16-channels-last": ("", "bf16"),
    "compiled-fp32": ("", "fp32"),
    "compiled-bf16": ("", "bf16"),
    "optimum-onnx": ("optimum-onnx", "fp32"),
    "optimum-intel-fp32": ("optimum-intel", "fp32"),
    "optimum-intel-bf16": ("optimum-intel", "bf16"),
}
"""Theirs: the environment where it is not this one, and what they compute in."""


def precision(name: str) -> str:
    """What a contender computes in: as its name ends, where it is no peer's."""
    _, known = PEERS.get(name.removesuffix(OWN_VAE), ("", name.rpartition("-")[2]))
    return known


class Worker:
    """A contender's process."""

    def __init__(self, name: str, source: Path, size: tuple[int, int], batch: int, **more: Any) -> None:
        """Start and load it; RuntimeError where that fails."""
        environment, _ = PEERS.get(name, ("", ""))
        python = ENVIRONMENTS / environment / "bin/python" if environment else Path(sys.executable)
        if not python.exists():
            raise RuntimeError(f"missing: {environment} is not installed (make bench-setup)")
        spec = {"contender": name, "source": str(source), "size": size, "batch": batch, **more}
        line = [str(python), str(HERE / "worker.py"), json.dumps(spec)]
        self.log = source.with_name(f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.loaded = self.read()

    def draw(self, steps: int, save: Path | None = None) -> dict[str, Any]:
        """One call: its seconds, stages and memory."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job(steps, save)) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """Its next line; RuntimeError with the end of its log where there is none."""
        assert self.process.stdout
        patience = threading.Timer(LIMIT, self.process.kill)
        patience.start()
        line = self.process.stdout.readline()
        in_time = patience.is_alive()
        patience.cancel()
        if not line and not in_time:
            raise RuntimeError(f"failed: no answer within {LIMIT:g} s")
        if not line:
            last = self.log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"failed: {' '.join(last)[:300]}")
        result: dict[str, Any] = json.loads(line)
        return result

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()


def job(steps: int, save: Path | None) -> dict[str, Any]:
    """What a worker is asked for."""
    return {"prompt": PROMPT, "seed": SEED, "steps": steps, "save": save and str(save)}


def with_vae(own: Checkpoint, source: str, vae: str, folder: Path) -> Checkpoint:
    """A checkpoint like `own` with another VAE, as links; "tiny" of a synthetic one is drawn."""
    made = parts.fetch(find(source), Want(folder), {"vae": vae})
    linked = folder / f"{own.folder.name}-{re.sub('[^a-z0-9]+', '-', vae.lower())}"
    linked.mkdir(exist_ok=True)
    for name in made.parts:
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to(made.parts[name].folder.resolve())
    (linked / "model_index.json").write_text(json.dumps(made.index))
    return open_folder(linked, own.variant)
