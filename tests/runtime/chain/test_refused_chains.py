"""A chain that is not sound is refused when it is opened, and so is a call that does not fit it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_calls import PICTURES, PROMPTS, changed, numbers
from small_graphs import I2I, SIZES, T2I

from turbochain.runtime import Bundle, BundleError, InputError, Pipeline
from turbochain.runtime.request import Request


@pytest.fixture
def copy(two_chains: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A copy that a test may change."""
    return copy_of(two_chains)


def in_chain(key: str, value: object, chain: str = I2I) -> Callable[[dict[str, Any]], object]:
    """Replace a part of a chain; `key`: "feeds/p"."""

    def edit(manifest: dict[str, Any]) -> None:
        *path, last = key.split("/")
        entry = manifest["chains"][chain]
        for part in path:
            entry = entry[int(part)] if isinstance(entry, list) else entry[part]
        entry[int(last) if isinstance(entry, list) else last] = value

    return edit


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a kind of feed": (in_chain("feeds/p", {"is": "temperature", "when": "call"}), "the feed p has 'temperature'"),
    "when a feed comes": (in_chain("feeds/p", {"is": "number", "when": "often"}), "the feed p has 'often'"),
    "a kind that does not come then": (
        in_chain("feeds/history", {"is": "history", "when": "step"}),
        "the feed history is history 'step', and call was expected",
    ),
    "a text": (in_chain("feeds/input_ids", {"is": "ids", "when": "call", "of": "poem"}), "input_ids has 'poem'"),
    "a feed that nothing reads": (in_chain("feeds/z", {"is": "number", "when": "call"}), "nothing reads the feed z"),
    "a place": (in_chain("stages/2/when", "before"), "the stage start has 'before'"),
    "a mode": (in_chain("stages/3/if", ["magic"]), "controlnet depends on the mode 'magic', which the chain lacks"),
    "an input without a source": (lambda m: m["chains"][I2I]["feeds"].pop("p"), "the input p of start has no source"),
    "a wire": (in_chain("stages/1/wires", {"x": "y"}), "the stage vae_encoder renames x, which its graph lacks"),
    "what a mode makes twice": (in_chain("stages/3/wires", {"residual": "latents"}), "latents is produced twice"),
    "zeros that only a feed of zeros may be": (
        in_chain("feeds/residual", {"is": "number", "when": "call"}),
        "residual is produced twice, by the caller and controlnet",
    ),
    "a stream of another shape": (in_chain("keep", {"next_history": "stream"}), "keep next_history → stream joins"),
    "a stream that nobody feeds": (in_chain("keep", {"next_stream": "p"}), "keep next_stream → p does not join"),
    "K": (lambda m: m["chains"][I2I].update(K=2), r"m is float32 \[3, 3\] for each step, and not float32 \[2, 2\]"),
    "a draw": (in_chain("draws/0", {"name": "luck", "per": "image"}), "the draw luck has no such tensor"),
    "a size": (in_chain("size", [24, 8]), "the output image is uint8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_chain_cannot_be_is_refused_when_it_is_opened(copy: Path, what: str) -> None:
    edit, message = REFUSED[what]
    with pytest.raises(BundleError, match=message):
        Bundle.open(changed(copy, edit))


def test_a_feature_of_a_later_version(copy: Path) -> None:
    """The reader names the version that has it, whatever else it does not understand."""
    changed(copy, lambda m: m["requires"].update({"time_travel": "9.1.0"}))
    with pytest.raises(BundleError, match=r"uses time_travel \(turbochain 9\.1\.0\), .*pip install --upgrade"):
        Pipeline.load(copy)


ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no picture": (I2I, {"inputs": numbers()}, "takes input_image, p, q, conditioning_scale; given: p, q"),
    "a picture of another mode": (
        I2I,
        {"inputs": {"input_image": PICTURES[0], "control_image": PICTURES[1], **numbers()}},
        "takes input_image, p, q, conditioning_scale; given: input_image, control_image",
    ),
    "three pictures for two": (
        I2I,
        {"inputs": {"input_image": np.zeros((3, *SIZES[I2I], 3), np.uint8), **numbers()}},
        "image has 3, and 2 are drawn: give one, one for each, or a number that divides 2",
    ),
    "a number for each step": (
        I2I,
        {"inputs": {"input_image": PICTURES[0], **numbers(), "conditioning_scale": np.ones(1, np.float32)}},
        r"an array of float32 \[3, 1\] was expected",
    ),
    "a mode": (T2I, {"modes": ["control"]}, r"modes=\['control'\]: the chain text-to-image has guidance"),
    "negative prompts": (
        T2I,
        {"negative_prompt": ["a"] * 3, "guidance_scale": 2.5},
        "negative_prompt is a list of 3: one, or one for each",
    ),
    "guidance of a chain that has none": (
        I2I,
        {"inputs": {"input_image": PICTURES[0], **numbers()}, "guidance_scale": 1.01},
        r"guidance_scale=1\.01: the chain image-to-image has no guidance; leave it out or give 0\.0",
    ),
    "a picture of a chain that reads none": (
        T2I,
        {"image": PICTURES[0]},
        "image was given, and the chain text-to-image reads none; leave it out",
    ),
    "a mask of a chain that reads none": (
        I2I,
        {"mask_image": PICTURES[0], "inputs": {"input_image": PICTURES[0], **numbers()}},
        "mask_image was given, and the chain",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_what_a_call_cannot_be_given(two_chains: Path, what: str) -> None:
    chain, arguments, message = ARGUMENTS[what]
    with pytest.raises(InputError, match=message):
        Request.make(Bundle.open(two_chains).open_chain(chain), PROMPTS, seed=0, **arguments)
