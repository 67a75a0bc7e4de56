"""Set the order of the tests and the cores that they run on, and define what they share that needs no torch.

What they share, the miniature checkpoints and the bundles, is in `bundles.py`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a thread for each process is what two cores have
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a process that compiles our modules anew takes long to start

import contextlib
import dataclasses
import fcntl
import gc
import io
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from kept import locked

from turbochain.engines import cli
from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing
from turbochain.runtime.commands import main

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "export", "engines")
SIZE = (64, 64)
FAMILIES = ("sd", "sdxl")
BATCH = {("sd", "fp32"): 1, ("sdxl", "fp32"): 3, ("sd", "fp16"): 1, ("sdxl", "fp16"): 1}  # of the shared bundles
HALF = ("sd", pytest.param("sdxl", marks=pytest.mark.full))  # families in fp16: SDXL's bundle takes 20 seconds
ON = {"backend": "onnxruntime", "device": "cpu"}  # where a test builds, on every machine, unless it is about another
ON_ARGUMENTS = ("--backend", "onnxruntime", "--device", "cpu")

BundleFactory = Callable[..., Path]

LONGEST_FIRST = (
    "test_parity.py",
    "test_demo.py",
    "test_first_gpu_run.py",
    "test_chains.py",
    "test_openvino.py",
    "test_int8.py",
    "test_conformance.py",
    "test_control.py",
    "test_verify.py",
    "test_bench.py",
    "test_tensorrt.py",
    "test_bad_input.py",
    "test_bad_calls.py",
    "test_build.py",
    "test_resources.py",
    "test_remedies.py",
    "test_guidance.py",
    "test_slots.py",
    "test_tokenizer.py",
    "test_stream.py",
    "test_backends.py",
    "test_tampering.py",
    "test_manifests.py",
    "test_hub_bundles.py",
    "test_inspect_engines.py",
    "test_lora_slots.py",
    "test_outside.py",
    "test_inversion.py",
    "test_parts.py",
    "test_schedulers.py",
    "test_synthetic.py",
    "test_weights.py",
    "test_relatives.py",
    "test_inpainting.py",
    "test_image_to_image.py",
    "test_diffusers_call.py",
    "test_single_file.py",
    "test_schedule.py",
    "test_tensorrt_api.py",
    "test_forks.py",
    "test_vae_encoder.py",
    "test_sampler_steps.py",
    "test_failures.py",
    "test_fuse.py",
    "test_trace.py",
    "test_openvino_model.py",
    "test_lora_patch.py",
    "test_first_verification.py",
    "test_pipeline.py",
    "test_ended_calls.py",
    "test_files.py",
)
"""The files that take over eight seconds; the others follow, so that neither process waits long for the other.

Not test_light.py, of which a test runs alone: at the end it waits for a short one of the other process.
"""


def in_each_precision(cases: Iterable[tuple[str, ...]]) -> list[ParameterSet]:
    """These cases, whose first word is the family, in fp32 and fp16; see `HALF`."""
    return [
        pytest.param(*case, precision, marks=[pytest.mark.full] * ((case[0], precision) == ("sdxl", "fp16")))
        for precision in ("fp32", "fp16")
        for case in cases
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundles", type=Path, metavar="FOLDER", help="keep the shared bundles here for the next session")
    parser.addoption("--combinations", default="0:6", metavar="A:B", help="the seeds of test_combinations.py")


CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set()


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of the session cores of its own: the libraries' threads spin, and would take the other's.

    An import or a trace makes very many objects that stay: Python need not look through them every 700. The process
    that only hands out the tests needs no fixtures: with them, the others would wait until it has imported torch.
    """
    gc.set_threshold(100_000, 20, 100)
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("bundles")
    if worker and 1 < count <= len(CORES):
        os.sched_setaffinity(0, sorted(CORES)[int(worker.removeprefix("gw")) :: count])


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test that is about several threads."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the libraries' objects, a million, would be looked at again in each collection


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While a test marked `alone` runs, the other process waits."""
    alone = item.get_closest_marker("alone") is not None
    lock = Path(item.config.cache.mkdir("turbochain")) / "lock"  # type: ignore[union-attr]
    with locked(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
        return (yield)


def reseal(path: Path) -> None:
    """Describe a bundle's files as they now are, its engines with them, so that only `verify` can tell of a change."""
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"] = {name: dataclasses.asdict(hashing.describe(path / name)) for name in manifest["files"]}
    (path / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(path)
    for file in path.glob("engines/*/engine.json"):
        made = json.loads(file.read_text())
        for name, graph in made["graphs"].items():
            graph["digest"] = bundle.graph_digest(name)
        made["verified"] = {name: bundle.open_chain(name).digest for name in made["checks"]}
        file.write_text(json.dumps(made))


def program(name: str) -> Path:
    """Where `turbochain` or `build-engine` is installed."""
    return Path(sys.executable).with_name(name)


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `turbochain` or `build-engine` (the first argument) as a user would; output captured as text."""
    line = [str(program(str(arguments[0]))), *map(str, arguments[1:])]
    return subprocess.run(line, capture_output=True, text=True, **{"timeout": 600, **options})  # type: ignore[call-overload]


def called(program: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Do what `command` does in this process, which saves the seconds that a process needs to start.

    For what is refused before any work, or makes one picture. A backend's own output is not captured.
    """
    entry = {"turbochain": main.main, "build-engine": cli.main}[program]
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = entry(words)
        except SystemExit as exit:  # argparse's
            status = int(exit.code or 0)
    return subprocess.CompletedProcess([program, *words], status, out.getvalue(), err.getvalue())
