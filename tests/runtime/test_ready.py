"""What encoders made is kept for the next call, unless the call has overwritten it."""

from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from calls import on_cpu, output


@pytest.mark.parametrize("other", [tiny_bundle.call("a dog", 2), tiny_bundle.call("a cat", 1, control=2)])
def test_what_goes_round_the_loop_is_not_kept(tmp_path: Path, other: dict) -> None:
    """The chain's encoder makes the latents themselves, which the steps overwrite."""
    call = tiny_bundle.call("a cat", 1)
    with on_cpu(tiny_bundle.write(tmp_path)) as pipe:
        made = []
        for one in (call, call, other, call):
            pipe._held.clear()  # restart the stream
            made.append(output(pipe, one).images)
    assert np.array_equal(made[1], made[0]) and np.array_equal(made[3], made[0])
    assert not np.array_equal(made[2], made[0])
