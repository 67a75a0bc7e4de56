"""Which captures succeed, which are refused or tried again, and what must not happen meanwhile."""

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import ALL, NEW, assert_nothing_left, draw, output
from standin import Error, OneByOne, StandIn, pipeline, standing_in

from turbochain.runtime.backends import cuda, tensorrt
from turbochain.runtime.backends.onnxruntime import OnnxRuntimeCuda
from turbochain.runtime.chain.recording import Launch


def test_a_capture_that_lacked_memory_is_tried_again(
    small: Path, right: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "turbochain")
    for status, again in ((Error.cudaErrorMemoryAllocation, True), (Error.cudaErrorInvalidValue, False)):
        caplog.clear()
        with standing_in() as runtime:
            with pipeline(small, StandIn) as pipe:
                pipe.prompt_cache.limit_bytes = 0  # every prompt is new
                runtime.fail["cudaGraphInstantiate"] = status
                first, *others = (output(pipe, NEW) for _ in range(3))
                for made in (first, *others):
                    np.testing.assert_array_equal(made.images, right[0])
                assert first.uncaptured is not None and "cudaGraphInstantiate" in first.uncaptured
                assert [made.uncaptured for made in others] == [None if again else first.uncaptured] * 2
                assert runtime.calls.count("cudaStreamBeginCapture") == 1 + again
            (warning,) = caplog.messages
            assert "the plan of text_encoder, 2 unet, 2 step, vae_decoder runs graph by graph" in warning
            assert_nothing_left(runtime)


class Context:
    """An execution context of TensorRT-RTX, which is asked whether it can be captured."""

    def __init__(self, capturable: bool) -> None:
        self.capturable, self.asked = capturable, 0

    def is_stream_capturable(self, stream: int) -> bool:
        assert isinstance(stream, int)
        self.asked += 1
        return self.capturable


class Choosy(StandIn):
    """The decoder's context does not let itself be captured."""

    def __init__(self, *arguments: Any) -> None:
        self.contexts: dict[str, Context] = {}
        super().__init__(*arguments)

    def load_graph(self, graph: str) -> Any:
        stage, self.contexts[graph] = super().load_graph(graph), Context(graph != "vae_decoder")
        asked = tensorrt._Graph(graph, (), self.contexts[graph], 0)  # type: ignore[arg-type]
        stage.check_capturable = asked.check_capturable  # type: ignore[method-assign]
        return stage


def test_what_a_library_will_not_have_captured_is_not(
    small: Path, right: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    """The picture is made graph by graph, and a plan without that stage is captured."""
    with standing_in() as runtime:
        with pipeline(small, Choosy) as pipe:
            for call, expected in ((ALL[0], right[0]), (ALL[1], right[1])):
                made = output(pipe, call)
                assert made.uncaptured == "TensorRT says that vae_decoder cannot be captured"
                np.testing.assert_array_equal(made.images, expected)
            assert "cudaStreamBeginCapture" not in runtime.calls and len(caplog.messages) == 2  # one for each plan
            assert output(pipe, ALL[8]).uncaptured is None  # its latents
            assert isinstance(pipe._executor, Choosy)
            asked = {name: context.asked for name, context in pipe._executor.contexts.items()}
        assert asked["vae_decoder"] == 2 and min(asked["unet"], asked["text_encoder"]) > 0
        assert_nothing_left(runtime)


class Looking(OneByOne):
    """The captured graph is inspected in the same way as ONNX Runtime's executor inspects it."""

    check_captured = OnnxRuntimeCuda.check_captured


class Staging(Looking):
    """Its stages read memory of the host that is not the executor's, as an older ONNX Runtime does."""

    def _launch(self, launch: Launch, at: Mapping[str, int], stream: Any) -> None:
        super()._launch(launch, at, stream)
        cuda.copy(self.block, self.staged.ctypes.data, self.staged.nbytes, stream)

    def load_graph(self, graph: str) -> Any:
        if not self.loaded:
            self.staged, self.block = self.session.pinned((4,), "uint8"), self.session.allocate(4, "a test")
        return super().load_graph(graph)


def test_a_graph_that_reads_a_librarys_memory_of_the_host_is_not_launched(small: Path, right: list[np.ndarray]) -> None:
    """The executor's own page-locked memory may be read and written; a picture is right in either case."""
    for kind, reason in ((Looking, None), (Staging, "it copies from or to memory of the host that is another's")):
        with standing_in() as runtime:
            with pipeline(small, kind) as pipe:
                for i in (0, 3):  # with uploads and downloads of all kinds
                    made = output(pipe, ALL[i])
                    assert made.uncaptured == reason
                    np.testing.assert_array_equal(made.images, right[i])
            assert_nothing_left(runtime)


class Littering(StandIn):
    """Leaves garbage behind while it is captured, whose destructors free memory of the GPU."""

    def _launch(self, launch: Launch, at: Mapping[str, int], stream: Any) -> None:
        super()._launch(launch, at, stream)
        Garbage()
        [[] for _ in range(1000)]  # enough for a collection


class Garbage:
    def __init__(self) -> None:
        self.cycle = self
        self.session = cuda.Session(0)

    def __del__(self) -> None:
        self.session.close()  # it waits and frees, as every destructor of a library does


def test_no_garbage_is_collected_during_a_capture(small: Path, right: list[np.ndarray]) -> None:
    before = gc.get_threshold()
    gc.set_threshold(10)
    try:
        with standing_in() as runtime:
            with pipeline(small, Littering) as pipe:
                assert gc.isenabled()
                np.testing.assert_array_equal(draw(pipe, NEW), right[0])
                assert gc.isenabled()
                gc.disable()  # the caller's wish is left alone
                np.testing.assert_array_equal(draw(pipe, NEW | {"seed": 6}), right[1])
                assert not gc.isenabled()
            gc.collect()
            assert_nothing_left(runtime)
    finally:
        gc.set_threshold(*before)
        gc.enable()
