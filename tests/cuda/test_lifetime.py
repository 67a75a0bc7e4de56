"""What is left when a pipeline goes and when a call is interrupted, and what is kept for the next one."""

import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import ALL, CONTROLLED, IMAGES, NEW, OTHER, PICTURE, assert_nothing_left, draw, output
from standin import Error, OneByOne, Runtime, StandIn, pipeline, standing_in

from turbochain.runtime import CudaFault, OutOfMemory
from turbochain.runtime.backends import cuda
from turbochain.runtime.chain.plan import Constant, Copy, Download, Run, Upload
from turbochain.runtime.chain.recording import Launch
from turbochain.runtime.errors import Cancelled, CudaError


def test_a_pipeline_that_is_dropped_gives_everything_back(small: Path) -> None:
    """By its last reference, or by the garbage collection if it is in a cycle."""
    for in_a_cycle in (False, True):
        with standing_in() as runtime:
            pipe = pipeline(small, StandIn, 1)
            draw(pipe, NEW)
            draw(pipe, CONTROLLED)
            assert {"Module", "Executable", "Stream"} <= {*runtime.leaked()}
            if in_a_cycle:
                pipe.cycle = pipe  # type: ignore[attr-defined]
            del pipe
            if in_a_cycle:
                gc.collect()
            assert_nothing_left(runtime)
            assert runtime.cudaGetDevice()[1] == 0


def test_a_pipeline_that_could_not_be_made_leaves_nothing(small: Path) -> None:
    """The GPU's memory suffices for some of the stages."""
    with standing_in(total=5 * 4096 + 100) as runtime:
        with pytest.raises(OutOfMemory, match=r"out of memory"), pipeline(small, StandIn) as pipe:
            draw(pipe, CONTROLLED)
        gc.collect()
        assert_nothing_left(runtime)


def fault(runtime: Runtime, small: Path) -> int:
    """Let a pipeline meet a fault, try everything, and close; returns how many stages it had."""
    pipe = pipeline(small, StandIn)
    executor = pipe._executor
    assert executor is not None
    draw(pipe, NEW)
    stages = runtime.leaked().count("Module")
    runtime.fail["cudaGraphLaunch"] = Error.cudaErrorLaunchFailure
    for use in (
        lambda: draw(pipe, NEW | {"seed": 6}),
        lambda: draw(pipe, OTHER),
        lambda: draw(pipe, PICTURE),
        lambda: executor.load(["unet"]),
        lambda: executor.unload("unet"),
        lambda: pipeline(small, StandIn),
    ):
        with pytest.raises(CudaFault, match="cannot be used by this process any more; restart it"):
            use()
    pipe.close()
    pipe.close()
    return stages


def test_after_a_fault_the_stages_are_kept(small: Path) -> None:
    """Their destructors would end the process. Every call says what has happened."""
    with standing_in() as runtime:
        stages = fault(runtime, small)
        gc.collect()
        assert runtime.problems() == [] and runtime.leaked().count("Module") == stages


def test_a_forked_process_leaves_the_gpu_to_its_parent(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in() as runtime:
        pipe = pipeline(small, StandIn)
        draw(pipe, NEW)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # as it is in a child
            called = len(runtime.calls)
            del pipe
            gc.collect()
            assert len(runtime.calls) == called and "Module" in runtime.leaked()


class Failing(StandIn):
    """One launch of a graph fails when others are on the streams already."""

    fails: str | None = None

    def _launch(self, launch: Launch, at: Mapping[str, int], stream: Any) -> None:
        if launch.graph == self.fails:
            raise CudaError("this test wants it so")
        super()._launch(launch, at, stream)


@pytest.mark.parametrize("graph", ["text_encoder", "vae_encoder", "start", "unet@24x8"])
def test_after_an_error_nothing_is_left_on_a_stream(small: Path, right: list[np.ndarray], graph: str) -> None:
    """A stage on a side stream must not write what the next picture has its own in."""
    for seed in range(5):
        with standing_in(seed) as runtime:
            with pipeline(small, Failing) as pipe:
                executor = pipe._executor
                assert isinstance(executor, Failing)
                np.testing.assert_array_equal(draw(pipe, NEW), right[0])
                executor.fails = graph
                with pytest.raises(CudaError, match="this test"):
                    output(pipe, CONTROLLED)
                assert not [*runtime.scheduler.pending()]
                executor.fails = None
                np.testing.assert_array_equal(draw(pipe, NEW), right[0])
                np.testing.assert_array_equal(draw(pipe, PICTURE), right[3])
            assert_nothing_left(runtime)


def test_an_interrupted_call_leaves_nothing_on_a_stream(small: Path, right: list[np.ndarray]) -> None:
    """Whatever it was interrupted by."""
    for error in (KeyboardInterrupt, ZeroDivisionError, Cancelled):
        with standing_in() as runtime:
            with pipeline(small, StandIn) as pipe:
                draw(pipe, NEW)
                asked = iter([False, False, True])

                def cancel(asked: Iterator[bool] = asked, error: type[BaseException] = error) -> bool:
                    if next(asked):
                        raise error
                    return False

                with pytest.raises(error):
                    output(pipe, OTHER, observe=lambda graph, seconds: None, cancel=cancel)
                assert not [*runtime.scheduler.pending()]
                np.testing.assert_array_equal(draw(pipe, NEW), right[0])
            assert_nothing_left(runtime)


def test_more_rows_need_no_more_waits(small: Path) -> None:
    """A column of a table is one block, one copy and one wait, however many rows it has."""
    made = []
    for steps in (2, 3):
        with standing_in() as runtime, pipeline(small, StandIn) as pipe:
            before = len(runtime.calls)
            draw(pipe, NEW | {"num_inference_steps": steps})
            calls = runtime.calls[before:]
            made.append((calls.count("cudaStreamSynchronize"), calls.count("cudaMalloc")))
    (waits, blocks), (waits_of_3, blocks_of_3) = made
    assert waits_of_3 == waits and blocks_of_3 == blocks + 1  # the noise of the row


def test_a_plan_that_ran_is_found_without_reading_it(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have hundreds of operations, and a call should not wait for that."""

    def refuse(*_: object) -> Any:
        raise AssertionError("an operation was looked at")

    with standing_in(), pipeline(small, StandIn) as pipe:
        for _ in range(2):
            draw(pipe, NEW)  # the second one's prompt is known
        for kind in (Upload, Constant, Run, Copy, Download):
            for method in ("__hash__", "__eq__"):
                monkeypatch.setattr(kind, method, refuse)
        draw(pipe, NEW | {"seed": 6})


class Two(StandIn):
    most_plans = 2


def test_the_plans_used_last_are_kept(small: Path, right: list[np.ndarray]) -> None:
    """Two of them: the others are captured again when they come back, and make the same pictures."""
    first, second, third = NEW, NEW | {"num_inference_steps": 3}, NEW | {"output_type": "latent"}
    with standing_in() as runtime:
        with pipeline(small, Two) as pipe:
            draw(pipe, NEW)  # the prompt is known from now on
            for call, captured in (
                (first, 1),
                (second, 1),
                (first, 0),
                (third, 1),
                (first, 0),
                (second, 1),
                (third, 1),
            ):
                before = runtime.calls.count("cudaStreamBeginCapture")
                draw(pipe, call)
                assert runtime.calls.count("cudaStreamBeginCapture") - before == captured, call
            for call, expected in zip(ALL, right, strict=True):
                np.testing.assert_array_equal(draw(pipe, call), expected)
                assert runtime.leaked().count("Executable") <= 2
        assert_nothing_left(runtime)


def test_equal_rows_of_tables_are_on_the_gpu_once(sd: Path) -> None:
    """A run that begins later has some rows of the whole run, and all step counts share the first timestep."""
    call = {"chain": "image-to-image", "prompt": "a cat", "image": IMAGES[0]}
    with standing_in() as runtime, pipeline(sd, StandIn) as pipe:
        executor, columns = pipe._executor, pipe.bundle.open_chain("image-to-image").columns("4")
        name, column = max(columns.items(), key=lambda item: item[1][0].nbytes)
        assert executor is not None and column[0].nbytes > 1000
        for steps, strength, rows in ((4, 0.5, 2), (4, 1.0, 4), (4, 0.25, 4), (3, 1.0, 6), (3, 0.7, 6)):
            draw(pipe, call | {"num_inference_steps": steps, "strength": strength})
            held = [t.nbytes for buffer, t in executor._buffers.on_gpu if buffer.startswith(f"{name}[")]
            assert sum(held) == rows * -(-column[0].nbytes // cuda.ALIGNMENT) * cuda.ALIGNMENT
        assert runtime.problems() == []


@pytest.mark.parametrize("kind", [StandIn, OneByOne])
def test_unloading_gives_memory_back(small: Path, right: list[np.ndarray], kind: type[StandIn]) -> None:
    """The graph's own, the plans' that run it, and the scratch memory that others have outgrown."""
    with standing_in() as runtime:
        with pipeline(small, kind) as pipe:
            executor = pipe._executor
            assert executor is not None
            for i, (call, expected) in enumerate(zip(ALL, right, strict=True)):
                np.testing.assert_array_equal(draw(pipe, call), expected)
                on_gpu = sum(block.device is not None for block in runtime.memory.live)
                stages = len(executor.loaded) * (
                    1 if kind is StandIn else 2
                )  # weights, and scratch memory of their own
                assert on_gpu == len(executor._buffers.on_gpu) + stages + (kind is StandIn)
                if i == 2:
                    before = runtime.leaked()
                    executor.unload("text_encoder")
                    after = runtime.leaked()
                    assert [after.count(k) - before.count(k) for k in ("Module", "Executable")] in ([-1, -1], [-1, -2])
                    with pytest.raises(KeyError):
                        executor.unload("text_encoder")
                    executor.load(["text_encoder"])
        assert_nothing_left(runtime)
