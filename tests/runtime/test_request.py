"""A call's arguments as a value: what a server can queue, compare and hash."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bad_calls import CALLS, NOISE

from turbochain.runtime import Bundle, InputError
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.request import Request

EMBEDS = np.zeros((1, 77, 64), np.float32)
DIFFERENT: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a dog"},
    "two prompts": {"prompt": ["a cat", "a cat"]},
    "steps": {"num_inference_steps": 2},
    "seed": {"seed": 1},
    "one generator for each": {"seed": [0]},
    "latents": {"latents": NOISE},
    "other latents": {"latents": NOISE + np.float32(1)},
    "output type": {"output_type": "np"},
    "guidance": {"guidance_scale": 2.0},
    "more guidance": {"guidance_scale": 3.0},
    "a negative prompt": {"guidance_scale": 2.0, "negative_prompt": "a dog"},
    "latents instead of a picture": {"output_type": "latent"},
    "prompt_embeds": {"prompt": None, "prompt_embeds": EMBEDS},
    "other prompt_embeds": {"prompt": None, "prompt_embeds": EMBEDS + np.float32(1)},
    "two prompt_embeds": {"prompt": None, "prompt_embeds": EMBEDS, "num_images_per_prompt": 2},
}
"""Calls that give other results than the plain one, each of its own."""


@pytest.fixture(scope="module")
def chain(sd: Path) -> OpenChain:
    return Bundle.open(sd).open_chain()


def make(chain: OpenChain, **arguments: Any) -> Request:
    return Request.make(chain, **{"prompt": "a cat", "seed": 0, **arguments})


@pytest.mark.parametrize("case", [None, *DIFFERENT])
def test_equal_calls_are_equal_requests(chain: OpenChain, case: str | None) -> None:
    arguments = DIFFERENT[case] if case else {}
    one, other = make(chain, **arguments), make(chain, **{name: _copy(value) for name, value in arguments.items()})
    assert one is not other and one == other and hash(one) == hash(other)
    assert {one: "queued"}[other] == "queued"


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def test_different_calls_are_different_requests(chain: OpenChain) -> None:
    requests = [make(chain), *(make(chain, **arguments) for arguments in DIFFERENT.values())]
    assert len(set(requests)) == len(requests)
    assert all(one != other for i, one in enumerate(requests) for other in requests[:i])
    assert make(chain) != "a cat" and make(chain, latents=NOISE).latents != NOISE.tobytes()


def test_what_means_the_same_is_equal(chain: OpenChain) -> None:
    plain = make(chain)
    for arguments in (
        {"prompt": ["a cat"]},
        {"num_inference_steps": 1},
        {"num_inference_steps": np.int64(1)},
        {"seed": np.uint64(0)},
        {"guidance_scale": 1.0},
        {"guidance_scale": None},
        {"height": 64, "width": 64},
        {"inputs": {}},
        {"seed": None, "generator": 0},
        {"seed": None, "generator": torch.Generator("cpu").manual_seed(0)},
        {"negative_prompt": "a dog"},
        {"clip_skip": None, "eta": 0.0, "original_size": (64, 64)},
    ):
        same = make(chain, **arguments)
        assert same == plain and hash(same) == hash(plain), arguments
        assert (type(same.table), type(same.seed)) == (str, int)
    assert make(chain, prompt="a cat", num_images_per_prompt=2) == make(chain, prompt=["a cat", "a cat"])
    guided = make(chain, guidance_scale=2)
    for arguments in (
        {"negative_prompt": ""},
        {"negative_prompt": [""]},
        {"inputs": {"guidance_scale": np.float32([2])}},
        {"modes": ["guidance"]},
    ):
        assert make(chain, guidance_scale=2.0, **arguments) == guided


def test_no_seed_is_drawn_once(chain: OpenChain) -> None:
    one, other = make(chain, seed=None), make(chain, seed=None)
    assert one != other
    assert make(chain, seed=one.seed) == one
    assert make(chain, prompt=["a", "b"], seed=[4, 5]).seed == [4, 5]


@pytest.mark.parametrize("case", CALLS)
def test_it_refuses_what_a_call_refuses(chain: OpenChain, case: str) -> None:
    arguments, expected = CALLS[case]
    with pytest.raises(InputError) as caught:
        make(chain, **arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_inputs_that_the_chain_does_not_take(chain: OpenChain) -> None:
    with pytest.raises(InputError, match="inputs: the chain text-to-image takes none; given: image"):
        make(chain, inputs={"image": np.zeros((1, 64, 64, 3), np.uint8)})


def test_latents_may_change_afterwards(chain: OpenChain) -> None:
    """A request that waits in a queue is what it was when it was made."""
    latents = NOISE.copy()
    request = make(chain, latents=latents)
    latents += 1
    assert request == make(chain, latents=NOISE)
    with pytest.raises(ValueError, match="read-only"):
        request.latents.value[:] = 0
