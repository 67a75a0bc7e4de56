"""Engines of a bundle with two chains: each chain is verified by itself, and one may be missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import by_hand
import pytest
import small_bundle
from safetensors.numpy import load_file, save_file
from small_bundle import CHAINS
from small_calls import PICTURES, PROMPTS, assert_same, changed, drawn, numbers
from small_graphs import I2I, T2I

from turbochain.runtime import BundleError, Pipeline
from turbochain.runtime.bundle import hashing
from turbochain.runtime.checks import verify

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture
def copy(two_chains: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A copy that a test may change."""
    return copy_of(two_chains)


def test_an_engine_without_the_second_chain(copy: Path) -> None:
    """It says so when that chain is used, and the first works before and after."""
    shutil.rmtree(copy / "engines")
    small_bundle.write_engine(copy, "onnxruntime", list(CHAINS[T2I].graphs))
    with Pipeline.load(copy) as pipe:
        reference = by_hand.text_to_image(PROMPTS, 5, 2)["image"]
        assert_same(drawn(pipe, T2I), reference)
        with pytest.raises(BundleError, match=f"lacks vae_encoder.* of the chain {I2I}.*: build-engine"):
            drawn(pipe, I2I, inputs={"input_image": PICTURES[0], **numbers()})
        assert_same(drawn(pipe, T2I), reference)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chain", [T2I, I2I])
def test_verification_passes_both_chains(two_chains: Path, chain: str, backend: str) -> None:
    """It judges each stage in each mode by what it makes."""
    _, of_chains = verify.verify_bundle(two_chains, chain=chain, backend=backend)
    (checks,) = of_chains.values()
    assert of_chains.keys() == {chain}
    assert {c.stage for c in checks} == {*CHAINS[chain].graphs, "ids", "schedule", "image"}
    verify.require(checks)


def test_verifications_of_two_chains_are_both_kept(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, of_chains = verify.verify_bundle(copy, backend="onnxruntime")
    for chain in (I2I, T2I):
        _, alone = verify.verify_bundle(copy, chain=chain, backend="onnxruntime")
        assert alone == {chain: of_chains[chain]}
    assert of_chains.keys() == {T2I, I2I}
    made = json.loads((copy / "engines/onnxruntime/engine.json").read_text())
    assert made["checks"].keys() == made["verified"].keys() == {T2I, I2I}
    for chain in (I2I, T2I):
        Pipeline.load(copy, chain=chain, backend="onnxruntime").close()
    assert not caplog.records  # which would say that it is verified now


WRONG: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "what history adds to the latents": (I2I, "2/m", (1, 0, 2)),
    "what the latents leave in history": (I2I, "2/m", (0, 2, 0)),
    "what the prediction adds": (T2I, "3/v", (2, 0)),
}
"""What is wrong → the chain, and the place of a number in its table file."""


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_number_of_a_table_is_refused(copy: Path, what: str) -> None:
    chain, array, place = WRONG[what]
    file = f"tables/{chain}.safetensors"
    arrays = load_file(copy / file)
    arrays[array][place] += 0.05
    save_file(arrays, copy / file)
    changed(copy, lambda m: m["files"].update({file: vars(hashing.describe(copy / file))}))
    _, of_chains = verify.verify_bundle(copy, chain=chain, backend="onnxruntime")
    assert {c.stage for c in of_chains[chain] if not c.passed} >= {"schedule", "image"}
