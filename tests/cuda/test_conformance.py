"""The executor of the GPU backends over the stand-in: the CPU backend's pictures, bit for bit."""

from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, BundleFactory
from standin import StandIn, pipeline, standing_in

from turbochain.runtime import Pipeline


def draw(pipe: Pipeline, **arguments: Any) -> np.ndarray:
    """A picture; on the stand-in, of one graph."""
    given = {"prompt": "a red cat", "seed": 5, "output_type": "uint8", **arguments}
    output = pipe(**given)
    assert output.uncaptured is None
    return output.images


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_the_cpus(family: str, bundle_of: BundleFactory) -> None:
    path = bundle_of(family)
    with Pipeline.load(path, backend="onnxruntime", device="cpu") as cpu:
        right = [draw(cpu, num_inference_steps=steps) for steps in (1, 2, 3, 4)]
    with standing_in(0) as runtime:
        with pipeline(path, StandIn) as pipe:
            for _ in range(2):
                for steps, picture in zip((1, 2, 3, 4), right, strict=True):
                    np.testing.assert_array_equal(draw(pipe, num_inference_steps=steps), picture)
        assert (runtime.problems(), runtime.leaked()) == ([], [])
