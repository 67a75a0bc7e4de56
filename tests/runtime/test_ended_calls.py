"""A call that is cancelled or fails leaves nothing behind; each call says what it took itself."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from launches import Ran, uint8

from turbochain.runtime import Cancelled, Pipeline


class After:
    """A `cancel` that ends the call when it is asked for the time of this number, from 0 on."""

    def __init__(self, position: int | None = None) -> None:
        self.position, self.asked = position, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked - 1 == self.position


@pytest.mark.parametrize("known", [False, True])
def test_a_call_may_be_cancelled_before_any_launch(one: Pipeline, ran: Ran, known: bool) -> None:
    """The next pictures are as if it had never been made, and the cache holds whole prompts alone."""
    call = {"seed": 3, "num_inference_steps": 2}
    others, expected = uint8(one, "a dog", **call), uint8(one, ["a cat", "a fox"], **call)
    one.prompt_cache.clear()
    uint8(one, ["a dog", *["a cat", "a fox"] * known], **call, observe=ran)
    kept, per_picture = one.prompt_cache.bytes, 5 if known else 6
    for position in range(2 * per_picture):
        ran.clear()
        with pytest.raises(Cancelled):
            one(["a cat", "a fox"], **call, cancel=After(position), observe=ran)
        assert ran.total() == position  # nothing is launched after it has been asked
        assert len(one.prompt_cache) == (3 if known else 1 + position // per_picture)
        np.testing.assert_array_equal(uint8(one, "a dog", **call), others)
        np.testing.assert_array_equal(uint8(one, ["a cat", "a fox"], **call), expected)
        one.prompt_cache.clear()
        uint8(one, ["a dog", *["a cat", "a fox"] * known], **call)
        assert one.prompt_cache.bytes == kept
    never = After()
    np.testing.assert_array_equal(uint8(one, ["a cat", "a fox"], **call, cancel=never), expected)
    assert never.asked == 2 * per_picture


def test_an_observer_that_raises_ends_the_call(one: Pipeline) -> None:
    expected = uint8(one, "a cat", seed=1)

    def observe(graph: str, seconds: float) -> None:
        if graph == "step":
            raise KeyError(graph)

    with pytest.raises(KeyError):
        one("a cat", seed=1, observe=observe)
    np.testing.assert_array_equal(uint8(one, "a cat", seed=1), expected)


def test_a_result_says_what_its_own_call_took(one: Pipeline) -> None:
    """Also if other threads draw at the same time."""
    seen: dict[int, list[float]] = {seed: [] for seed in range(6)}
    with ThreadPoolExecutor(3) as pool:
        outs = list(
            pool.map(
                lambda seed: one("a cat", seed=seed, observe=lambda graph, seconds: seen[seed].append(seconds)), seen
            )
        )
    for seed, out in enumerate(outs):
        assert out.seed == seed and out.uncaptured is None
        assert out.seconds >= out.device_seconds == pytest.approx(sum(seen[seed])) and out.device_seconds > 0
