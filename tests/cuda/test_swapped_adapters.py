"""Adapters under a captured CUDA graph, over the stand-in: a swap is an upload between launches."""

from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from calls import assert_nothing_left, on_cpu, output
from standin import OneByOne, StandIn, pipeline, standing_in
from test_lora_slots import draw

from turbochain.runtime.backends import cuda

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 1}


@pytest.mark.parametrize("kind", [StandIn, pytest.param(OneByOne, marks=pytest.mark.full)])
def test_a_swap_is_an_upload_between_launches(
    kind: type[StandIn],
    slotted: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A, B, A, none, both: the CPU backend's bits, and no further capture once each kind of call has been made."""
    files = {
        name: lora_files.write(tmp_path / f"{name}.safetensors", draw(checkpoints["sd"], seed=i, only=only), "kohya")
        for i, (name, only) in enumerate([("a", ""), ("b", "unet")])
    }
    states = (["a"], ["b"], ["a"], [], ["a", "b"], [])
    captured: list[int] = []
    original = cuda.Session.capture

    def capture(self: cuda.Session, *arguments: Any) -> Any:
        captured.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(cuda.Session, "capture", capture)
    with on_cpu(slotted) as right, standing_in() as runtime:
        with pipeline(slotted, kind) as pipe:
            for name, file in files.items():
                for of in (right, pipe):
                    of.load_lora_weights(file, adapter_name=name)
            seen, counts = dict[str, np.ndarray](), []
            for state in states:
                for of in (right, pipe):
                    of.set_adapters(state, 0.5)
                for call in (CALL, CALL | {"seed": 6}):  # the second one's prompt is known: another plan
                    made = output(pipe, call)
                    np.testing.assert_array_equal(made.images, output(right, call).images)
                    assert made.uncaptured is None
                    np.testing.assert_array_equal(made.images, seen.setdefault(f"{state} {call}", made.images))
                counts.append(len(captured))
            assert counts == [2] * len(states)
            assert len({images.tobytes() for images in seen.values()}) == len(seen) == 8
            for of in (right, pipe):
                of.unload_lora_weights()
            np.testing.assert_array_equal(output(pipe, CALL).images, output(right, CALL).images)
        assert_nothing_left(runtime)
