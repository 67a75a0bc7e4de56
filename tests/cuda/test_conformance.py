"""The executor of the GPU backends over the stand-in: the CPU backend's pictures bit for bit, in whatever order."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_stand_in
from calls import ALL, CONTROLLED, IMAGES, NEW, OF_TASK, PICTURE, assert_nothing_left, draw, of_chains, on_cpu, output
from conftest import FAMILIES, ON, SIZE, BundleFactory
from here import build_here
from standin import OneByOne, Runtime, StandIn, pipeline, standing_in, uncaptured
from torch_stand_in import AtLaunch

import torch_stages
from first_gpu_run import drawn, prepare
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle, Cancelled, Pipeline
from turbochain.runtime.backends import cuda
from turbochain.runtime.backends.gpu import GpuExecutor
from turbochain.runtime.bundle.manifest import INPAINTING

KINDS = (StandIn, OneByOne)


def conform(
    kind: type[GpuExecutor],
    path: Path,
    right: Sequence[np.ndarray],
    seed: int = 0,
) -> None:
    """Load, make all calls, close; raises if anything is not as it must be."""
    with standing_in(seed) as runtime:
        with pipeline(path, kind) as pipe:
            for call, expected in zip(ALL, right, strict=True):
                np.testing.assert_array_equal(draw(pipe, call), expected)
        assert_nothing_left(runtime)


def conform_in_each_way(path: Path, kinds: Sequence[type[GpuExecutor]], calls: Sequence[dict[str, Any]]) -> None:
    """Each kind in a random order of its own, with a call in between that is cancelled."""
    with on_cpu(path) as cpu:
        right = [draw(cpu, call) for call in calls]
    for seed, kind in enumerate(kinds):
        order = np.random.default_rng(seed).permutation(len(calls))
        with standing_in(seed) as runtime:
            with pipeline(path, kind) as pipe:
                for n, i in enumerate(order):
                    if n == len(order) // 2:
                        cancel_at_launch(pipe, calls[order[0]], 2 + seed)
                    made = output(pipe, calls[i])
                    np.testing.assert_array_equal(made.images, right[i], err_msg=str(calls[i]))
                    assert (made.uncaptured is None) == (kind in KINDS)
            assert_nothing_left(runtime)


def cancel_at_launch(pipe: Pipeline, call: dict[str, Any], launch: int) -> None:
    asked = iter(range(launch + 1))
    with pytest.raises(Cancelled):
        output(pipe, call, observe=lambda graph, seconds: None, cancel=lambda: next(asked) == launch)


@pytest.mark.parametrize("kind", [StandIn, pytest.param(OneByOne, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_chain_of_both_families(family: str, kind: type[GpuExecutor], bundle_of: BundleFactory) -> None:
    """Text-to-image, with guidance too, and image-to-image; SDXL has a mode for a negative prompt, and a batch of 3."""
    conform_in_each_way(bundle_of(family), (kind,), of_chains(bundle_of(family)))


OTHERS = (
    ("sd-turbo-mini", 2),
    ("lcm-sd15-mini", 1),
    *(pytest.param("sdxl-turbo-mini", batch, marks=pytest.mark.full) for batch in (1, 2)),
)


@pytest.mark.parametrize(("preset", "batch"), OTHERS)
def test_other_batches_and_a_latent_consistency_model(preset: str, batch: int, tmp_path: Path) -> None:
    """With 1 to 4 steps, a new prompt and a known one. PyTorch's modules are the stages: graphs take long to trace."""
    prepare.write_small(preset, checkpoint := tmp_path / preset)
    parts, calls = drawn.models(preset), of_batch(batch)
    with standing_in(batch) as runtime:
        place = AtLaunch(runtime)
        bundle, made = drawn.chain(checkpoint, parts, SIZE[0], place, "fp32", tmp_path / "x.bundle", batch)
        with torch_stand_in.on_cpu(bundle, made) as cpu:
            right = [draw(cpu, call) for call in calls]
        with torch_stages.pipeline(bundle, made, place) as pipe:
            for call, expected in zip(calls, right, strict=True):
                np.testing.assert_array_equal(draw(pipe, call), expected)
        del place, pipe
        assert_nothing_left(runtime)


@pytest.mark.full
@pytest.mark.parametrize(("family", "batch"), [("sd", 2), ("sdxl", 1), ("sdxl", 2)])
def test_graphs_of_other_batches(family: str, batch: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The same, with the graphs that an export makes."""
    how = {"precision": "fp32", "size": SIZE, "batch": batch, "tasks": ["text-to-image"], "quiet": True}
    path = build_here(str(checkpoints[family]), tmp_path / "x.bundle", **how, **ON).bundle
    conform_in_each_way(path, KINDS, of_batch(batch))


def of_batch(batch: int) -> list[dict[str, Any]]:
    """Calls for so many pictures: new prompts with each step count, and then some that are known."""
    prompts = ["a cat", "a dog", "a fox", "fog", "a red cat", "snow"]
    new = [{"prompt": prompts[s : s + batch], "num_inference_steps": s} for s in (1, 2, 3, 4)]
    return [*new, new[1] | {"seed": 6}, new[3] | {"num_inference_steps": 1}]


def test_inpainting(guided: Path) -> None:
    """The image is blended in after each step."""
    conform_in_each_way(guided, KINDS[:1], [{"chain": INPAINTING, **call} for call in OF_TASK[INPAINTING]])


@pytest.mark.full
def test_inpainting_with_a_history(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Two tensors go round the loop."""
    multistep = {"steps": [3], "scheduler": "DPMSolverMultistepScheduler"}  # of 2 the last is of first order
    shape = {"precision": "fp32", "size": SIZE, "tasks": ["inpainting"]}
    path = build_here(str(checkpoints["sd"]), tmp_path / "x.bundle", **shape, **multistep, quiet=True, **ON).bundle
    assert Bundle.open(path).open_chain().chain.K == 2
    calls = [call | {"num_inference_steps": 3} for call in of_chains(path)]
    conform_in_each_way(path, (StandIn, uncaptured(StandIn)), calls)


@pytest.mark.full
def test_controlnets_and_t2i_adapters(controlled: Path) -> None:
    """One, the other, and none, for which zeros are held."""
    plain = {"prompt": "a cat", "num_inference_steps": 2}
    canny = plain | {"control_image": IMAGES[0], "controlnet": "canny"}
    sketch = plain | {"control_image": IMAGES[1], "t2i_adapter": "sketch"}
    again = canny | {"controlnet_conditioning_scale": 0.5, "seed": 6}
    conform_in_each_way(controlled, KINDS, [plain, canny, sketch, again, plain | {"prompt": "a dog"}])


@pytest.mark.full
def test_a_latent_consistency_model(tmp_path: Path) -> None:
    """Its UNet reads the guidance scale, and its chains have no modes."""
    synthetic.write_checkpoint("lcm-sd15-mini", tmp_path / "checkpoint")
    how = {"precision": "fp32", "size": SIZE, "steps": [2, 4], "guidance_scales": [8.5, 1.0]}
    path = build_here(str(tmp_path / "checkpoint"), tmp_path / "x.bundle", **how, quiet=True, **ON).bundle
    alone = [
        {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": scale}
        for prompt, steps, scale in (("a cat", 2, 8.5), ("a cat", 4, 8.5), ("a dog", 4, 1.0))
    ]
    given = [{**call, "image": image, "strength": 0.8} for call, image in zip(alone, [*IMAGES, IMAGES[0]], strict=True)]
    of_task = {"text-to-image": alone, "image-to-image": given}
    conform_in_each_way(path, KINDS, [{"chain": name, **call} for name, calls in of_task.items() for call in calls])


@pytest.mark.parametrize("seed", range(30))
def test_in_a_random_order(small: Path, right: list[np.ndarray], seed: int) -> None:
    conform(KINDS[seed % 5 == 0], small, right, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(200))
def test_in_many_random_orders(small: Path, right: list[np.ndarray], seed: int) -> None:
    for kind in KINDS:
        conform(kind, small, right, 1000 + seed)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_by_stage(small: Path, right: list[np.ndarray], kind: type[GpuExecutor]) -> None:
    """With someone who observes the launches there is no one graph, and the same picture."""
    with standing_in() as runtime:
        with pipeline(small, kind) as pipe:
            for call, expected in zip(ALL, right, strict=True):
                seen: list[float] = []
                made = output(pipe, call, observe=lambda graph, seconds: seen.append(seconds))  # noqa: B023
                np.testing.assert_array_equal(made.images, expected)
                assert seen and all(seconds > 0 for seconds in seen)
                assert sum(seen) < made.device_seconds
        assert_nothing_left(runtime)


def test_the_second_gpu_leaves_the_thread_on_the_first(small: Path, right: list[np.ndarray]) -> None:
    for index in (0, 1):
        with standing_in() as runtime:
            assert cuda.call("cudaSetDevice", 1 - index) is None
            with pipeline(small, StandIn, index) as pipe:
                assert cuda.call("cudaGetDevice") == 1 - index
                for call, expected in zip(ALL, right, strict=True):
                    np.testing.assert_array_equal(draw(pipe, call), expected)
                    assert cuda.call("cudaGetDevice") == 1 - index
                assert pipe._executor is not None
                pipe._executor.unload("text_encoder")
                assert cuda.call("cudaGetDevice") == 1 - index
            assert cuda.call("cudaGetDevice") == 1 - index
            assert_nothing_left(runtime)


def together(*works: Callable[[], None]) -> None:
    """Do all this at once, each in its own thread; raises what the first one raised."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_two_threads_with_a_pipeline_each(small: Path, right: list[np.ndarray]) -> None:
    """While one captures, the other allocates and waits."""

    def life(index: int, kind: type[GpuExecutor]) -> None:
        with pipeline(small, kind, index) as pipe:
            for call, expected in zip(ALL, right, strict=True):
                np.testing.assert_array_equal(draw(pipe, call), expected)

    with standing_in() as runtime:
        together(lambda: life(0, StandIn), lambda: life(0, OneByOne), lambda: life(1, StandIn))
        assert_nothing_left(runtime)


def test_two_threads_with_one_pipeline(small: Path, right: list[np.ndarray]) -> None:
    """Loaded in one thread, used in others, closed in the first. Calls without a stream are in no order."""
    alone = [(call, expected) for call, expected in zip(ALL, right, strict=True) if "input_image" not in str(call)]

    with standing_in() as runtime:
        with pipeline(small, StandIn, 1) as pipe:

            def life() -> None:
                for call, expected in alone * 2:
                    np.testing.assert_array_equal(draw(pipe, call), expected)
                assert cuda.call("cudaGetDevice") == 0

            together(life, life)
        assert_nothing_left(runtime)


def test_a_graph_beside_different_others(small: Path) -> None:
    """Plans that group the stages otherwise follow each other, and none is captured: scratch memory suits them all."""
    calls = [PICTURE, CONTROLLED, NEW, PICTURE, CONTROLLED]
    with on_cpu(small) as cpu:
        right = [draw(cpu, call) for call in calls]
    for seed in range(10):
        with standing_in(seed) as runtime:
            with pipeline(small, uncaptured(StandIn)) as pipe:
                for cache in (pipe.prompt_cache, pipe.image_cache):
                    cache.limit_bytes = 0  # so that the encoders run side by side each time
                for call, expected in zip(calls, right, strict=True):
                    np.testing.assert_array_equal(output(pipe, call).images, expected)
            assert_nothing_left(runtime)


def test_the_stand_in_is_left_as_it_was() -> None:
    with standing_in() as runtime:
        assert isinstance(runtime, Runtime) and cuda._runtime() is runtime
    assert cuda._runtime() is not runtime
