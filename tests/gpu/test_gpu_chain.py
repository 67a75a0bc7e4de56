"""The chain on a real GPU, on miniatures: one graph, the same picture every time, and what goes wrong."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, BundleFactory, command

from turbochain.engines import build
from turbochain.runtime import Bundle, OutOfMemory, Pipeline, PipelineOutput, backends
from turbochain.runtime.backends import cuda
from turbochain.runtime.checks import verify
from turbochain.runtime.errors import InputError

pytestmark = pytest.mark.gpu

PROMPT = "a photo of a cat"
MIB = 2**20


def _on_gpu() -> list[str]:
    """The backends that are installed and find a GPU."""
    found = []
    for name in backends.names():
        try:
            backends.require(name)
            backends.get(name).device("cuda")
            found.append(name)
        except InputError:
            continue
    return found


# An empty list would leave every test out: without a GPU the first one must fail, not vanish.
BACKENDS = _on_gpu() or ["tensorrt"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(
    request: pytest.FixtureRequest, backend: str, bundle_of: BundleFactory, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A miniature fp16 bundle with an engine of the backend, verified by its build."""
    path = tmp_path_factory.getbasetemp() / f"gpu-{request.param}.bundle"
    build(str(bundle_of(request.param, precision="fp16")), path, backend=backend, device="cuda", quiet=True)
    return path


@pytest.fixture
def pipe(bundle: Path, backend: str) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, backend=backend, device="cuda") as loaded:
        yield loaded


def draw(pipe: Pipeline, seed: int = 0, steps: int = 1, prompt: str = PROMPT, **more: Any) -> PipelineOutput:
    return pipe(prompt, seed=seed, num_inference_steps=steps, output_type="uint8", **more)


def picture(pipe: Pipeline, seed: int = 0, steps: int = 1, prompt: str = PROMPT) -> np.ndarray:
    return draw(pipe, seed, steps, prompt).images


def graphs(pipe: Pipeline, *places: str) -> list[str]:
    """The graphs of the stages in these places."""
    return [stage.graph for stage in pipe.bundle.open_chain().chain.stages if stage.when in places]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_whole_chain_is_one_graph_and_makes_what_its_stages_make(pipe: Pipeline, steps: int) -> None:
    captured = draw(pipe, steps=steps)
    assert captured.uncaptured is None
    pipe.prompt_cache.clear()
    seen: list[str] = []
    apart = draw(pipe, steps=steps, observe=lambda graph, seconds: seen.append(graph))  # outside the CUDA graph
    np.testing.assert_array_equal(apart.images, captured.images)
    assert seen == [*graphs(pipe, "prompt"), *graphs(pipe, "step") * steps, *graphs(pipe, "end")]


def test_a_known_prompt_gives_the_same_picture_without_the_text_encoders(pipe: Pipeline) -> None:
    first = picture(pipe)
    seen: list[str] = []
    np.testing.assert_array_equal(draw(pipe, observe=lambda graph, seconds: seen.append(graph)).images, first)
    assert not set(seen) & set(graphs(pipe, "prompt"))


def test_the_engine_is_what_diffusers_made(bundle: Path, backend: str) -> None:
    _, checks = verify.verify_bundle(bundle, backend=backend, device="cuda")
    verify.require(checks)
    assert {c.stage for c in checks} >= {"image", *Bundle.open(bundle).open_chain().graphs}


def test_a_thousand_repeats_are_bit_identical(pipe: Pipeline) -> None:
    first = picture(pipe, steps=2)
    for i in range(1000):
        if i % 3 == 0:
            picture(pipe, seed=i + 1, steps=1 + i % 4, prompt=f"another prompt {i}")  # nothing of it may stay
        np.testing.assert_array_equal(picture(pipe, steps=2), first)


def test_two_pipelines_in_one_process_do_not_disturb_each_other(bundle: Path, backend: str) -> None:
    with Pipeline.load(bundle, backend=backend, device="cuda") as one:
        alone = [picture(one, seed) for seed in range(5)]
        with Pipeline.load(bundle, backend=backend, device="cuda") as two:
            for seed, expected in enumerate(alone):
                np.testing.assert_array_equal(picture(two, seed), expected)
                np.testing.assert_array_equal(picture(one, seed), expected)
        np.testing.assert_array_equal(picture(one, 0), alone[0])


def test_gpu_memory_is_steady_over_five_thousand_pictures(pipe: Pipeline) -> None:
    def some(count: int) -> int:
        for i in range(count):
            picture(pipe, seed=i, steps=1 + i % 2, prompt=f"prompt {i % 7}")
        return cuda.free_bytes()

    after_warmup = some(50)
    assert abs(some(5000) - after_warmup) <= 2 * MIB


def test_loading_and_closing_gives_all_memory_back(bundle: Path, backend: str) -> None:
    def once() -> int:
        with Pipeline.load(bundle, backend=backend, device="cuda") as pipe:
            picture(pipe)
        return cuda.free_bytes()

    once()
    after_first = once()  # libraries keep what they set up once
    for _ in range(5):
        last = once()
    assert after_first - last <= 2 * MIB


def test_without_memory_the_error_says_how_much_and_the_process_goes_on(bundle: Path, backend: str) -> None:
    hog = cuda.Session(0)
    taken = 0
    for size in (2**30, 2**26, 2**22, 2**20):  # ever smaller, until nothing is left
        while True:
            try:
                hog.allocate(size, "the test")
                taken += size
            except OutOfMemory as error:
                assert f"the test needs {size // MIB} MiB" in str(error)
                break
    assert taken > 2**30
    with pytest.raises(OutOfMemory, match=r"out of memory|Failed to allocate"):
        Pipeline.load(bundle, backend=backend, device="cuda")
    hog.close()
    with Pipeline.load(bundle, backend=backend, device="cuda") as pipe:
        assert picture(pipe).std() > 0


FAULT = """
import sys
import torch
from turbochain.runtime import CudaFault, Pipeline
pipe = Pipeline.load(sys.argv[1], backend=sys.argv[2], device="cuda")
pipe("a", seed=0)
try:  # a kernel that writes outside its array: CUDA refuses this process from now on
    torch.zeros(4, device="cuda")[torch.tensor([10**9], device="cuda")] = 1
    torch.cuda.synchronize()
except Exception:
    pass
for _ in range(3):
    try:
        pipe("a", seed=0)
        print("no error")
    except CudaFault as error:
        print(error)
pipe.close()
print("closed")
"""


def test_after_a_fault_the_pipeline_refuses_to_go_on(bundle: Path, backend: str) -> None:
    line = [sys.executable, "-c", FAULT, str(bundle), backend]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all("cannot be used by this process any more; restart it" in line for line in lines[:3])
    assert lines[3] == "closed"


def test_the_commands_work_on_the_gpu(bundle: Path, backend: str, tmp_path: Path) -> None:
    made = command(
        "turbochain", "generate", bundle, PROMPT, "--backend", backend, "--device", "cuda", "-o", tmp_path / "a.png"
    )
    assert made.returncode == 0, made.stderr
    timed = command("turbochain", "bench", bundle, "--backend", backend, "--device", "cuda", "--runs", 20)
    assert timed.returncode == 0, timed.stderr
    assert "overhead" in timed.stdout and "not one CUDA graph" not in timed.stdout


def test_a_gpu_that_is_not_there_is_refused(bundle: Path, backend: str) -> None:
    with pytest.raises(InputError, match=r"device='cuda:99': this machine has \d+ GPUs?, numbered from 0"):
        Pipeline.load(bundle, backend=backend, device="cuda:99")


def test_the_host_needs_under_0_3_ms_of_a_picture(pipe: Pipeline) -> None:
    picture(pipe)
    outside = []
    for i in range(300):
        pipe.prompt_cache.clear()
        made = draw(pipe, seed=i)
        outside.append(1e3 * (made.seconds - made.device_seconds))
    # The miniature's picture and prompt are smaller than a full one's; `make bench-gpu` measures those.
    assert np.median(outside) < 0.3
