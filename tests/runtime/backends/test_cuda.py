"""The real cuda-bindings where there is no GPU: each way of lacking one has its message, and nothing crashes.

Below them a driver of a few lines stands in for a machine with a driver that is too old, or without a GPU: the CUDA
runtime itself is the real one, and decides.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import called

from turbochain.runtime import Bundle, InputError, NoGpu, Pipeline, backends, selection
from turbochain.runtime.backends import cuda
from turbochain.runtime.bundle.manifest import Gpu

NO_DRIVER = r"there is no NVIDIA driver on this machine: install one, or use a backend for the CPU"

DRIVER = """
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
static int other(void) { return INIT; }
static int same(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
    *function = same(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
              : same(name, "cuInit") ? (void *)cuInit
              : same(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)other;
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
int cuGetExportTable(const void **table, const void *id) { return INIT; }
"""


@pytest.fixture(scope="module", autouse=True)
def _no_driver() -> None:
    if cuda.call("cudaDriverGetVersion"):
        pytest.skip("this machine has an NVIDIA driver")


ENTRIES = {
    "find": lambda: cuda.find(None),
    "find by number": lambda: cuda.find("cuda:3"),
    "Session": lambda: cuda.Session(0),
    "call": lambda: cuda.call("cudaMalloc", 16),
    "free_bytes": cuda.free_bytes,
    "launch": lambda: cuda.launch(0, 0),
    "copy": lambda: cuda.copy(0, 0, 0, 0),
    "record": lambda: cuda.record_event(0, 0),
    "wait": lambda: cuda.wait_event(0, 0),
    "synchronize": lambda: cuda.synchronize(0),
    "elapsed": lambda: cuda.elapsed(0, 0),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_driver_every_entry_says_so(entry: str) -> None:
    with pytest.raises(NoGpu, match=NO_DRIVER):
        ENTRIES[entry]()


METHODS = {
    "active": lambda session: session.active().__enter__(),
    "allocate": lambda session: session.allocate(16, "a test"),
    "pinned": lambda session: session.pinned((4,), "float32"),
    "stream": lambda session: session.stream(),
    "event": lambda session: session.event(timing=True),
    "capture": lambda session: session.capture(0, lambda: None),
}


@pytest.mark.parametrize("method", METHODS)
def test_without_a_driver_a_session_makes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as if the driver had gone after the session was made
        patch.setattr(cuda.Session, "active", lambda self: contextlib.nullcontext())
        session = cuda.Session(0)
    with pytest.raises(NoGpu, match=NO_DRIVER):
        METHODS[method](session)
    session.close()
    session.close()


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:0:1", ""])
def test_a_device_of_another_name_is_refused_first(name: str) -> None:
    if name:
        with pytest.raises(InputError, match=r"cuda, or cuda:N for the GPU of number N, was expected"):
            cuda.find(name)
    else:  # an empty name is no name
        with pytest.raises(NoGpu):
            cuda.find(name)


@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
def test_tensorrt_asks_for_the_driver_before_it_is_touched(device: str | None) -> None:
    script = (
        "import sys; from turbochain.runtime import backends\n"
        f"try: backends.get('tensorrt').device({device!r})\n"
        "except ValueError as error: print(error)\n"
        "print([m for m in sys.modules if 'tensorrt' in m and not m.startswith('turbochain')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [NO_DRIVER, "[]"]


def test_the_commands_say_it_in_one_line(sd: Path) -> None:
    for line in (
        ("build-engine", sd, "--backend", "tensorrt"),
        ("build-engine", sd, "--backend", "tensorrt", "--device", "cuda:1"),
    ):
        done = called(*line)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.strip().endswith(NO_DRIVER)
        assert "Traceback" not in done.stderr


def test_a_pipeline_for_a_gpu_is_refused_with_the_way_out(sd: Path) -> None:
    with pytest.raises(NoGpu, match=NO_DRIVER):
        Pipeline.load(sd, backend="tensorrt")
    with pytest.raises(InputError, match=r"onnxruntime runs on 'cpu'; on a GPU with .*turbochain\[cuda\]"):
        Pipeline.load(sd, backend="onnxruntime", device="cuda")


def test_without_a_gpu_the_best_backend_is_for_the_cpu() -> None:
    name, _ = backends.best()
    assert backends.get(name).device(None).kind == "cpu"


def test_without_a_gpu_no_backend_for_one_is_left_to_choose() -> None:
    with pytest.raises(InputError, match=r"no backend can run here: .*there is no NVIDIA driver"):
        backends.best("cuda")


def test_without_cuda_bindings_the_install_line_is_given() -> None:
    script = (
        "import sys; sys.modules['cuda'] = None\n"
        "from turbochain.runtime.backends import cuda\n"
        "try: cuda.find(None)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "BackendMissing cuda-bindings is not installed: pip install 'turbochain[tensorrt]'"


@pytest.mark.parametrize(
    ("version", "init", "message"),
    [
        (11040, 100, r"the NVIDIA driver is too old: it serves CUDA 11\.4, .* pip install 'cuda-bindings<12'"),
        (99000, 100, r"the NVIDIA driver sees no GPU: check CUDA_VISIBLE_DEVICES, or use a backend for the CPU"),
        # A service of the driver does not run (cudaErrorSystemNotReady).
        (
            99000,
            802,
            r"the NVIDIA driver gives no access to a GPU; mend it, or use a backend .*not yet .*",
        ),
    ],
)
def test_a_driver_that_is_of_no_use_is_told_from_none(tmp_path: Path, version: int, init: int, message: str) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    line = [
        "cc",
        "-shared",
        "-fPIC",
        "-w",
        f"-DVERSION={version}",
        f"-DINIT={init}",
        "-o",
        tmp_path / "libcuda.so.1",
        source,
    ]
    subprocess.run(line, check=True)
    script = (
        "from turbochain.runtime.backends import cuda\n"
        "try: cuda.find(None)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    ).stdout
    kind, _, text = out.strip().partition(" ")
    assert kind == "NoGpu"
    assert re.fullmatch(message, text), text


def test_an_engine_for_a_gpu_says_why_it_does_not_fit_and_what_builds_one(sd: Path) -> None:
    bundle = Bundle.open(sd)
    chain = bundle.open_chain()
    made = selection.select(chain).engine
    key = dataclasses.replace(
        made.key, backend="tensorrt", device="cuda", gpu=Gpu("NVIDIA L4", "8.9", 24 * 2**30), options={}
    )
    foreign = dataclasses.replace(made, key=key)
    assert selection.misfit(chain, foreign) == NO_DRIVER
    assert selection.rebuild(bundle, foreign) == f"build-engine {sd} --backend tensorrt"
