"""The table that a call follows: of its steps, its strength, and the guidance scale of an LCM."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler, LatentConsistencyModelPipeline, StableDiffusionImg2ImgPipeline
from small_bundle import CHAINS
from small_graphs import I2I

from turbochain.runtime import Bundle, InputError
from turbochain.runtime.bundle.manifest import TableEntry
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.inputs import guidance
from turbochain.runtime.inputs.rows import table_of

STEPS = (1, 2, 3, 4, 7, 50)
STRENGTHS = (0.0, 0.01, 0.02, 0.1, 0.25, 0.29, 0.3, 1 / 3, 0.5, 0.57, 0.58, 0.7, 0.8, 0.99, 1.0, 1)
OF_NUMPY = (np.float32(0.7), np.float64(0.58), np.float16(0.3))
LATE = {f"{n} begin {begin}": TableEntry(n, n - begin, begin) for n in STEPS for begin in range(n)}
"""As image-to-image has them: for each row that a run may begin at."""


def chain_of(path: Path, tables: Mapping[str, TableEntry], **defaults: float) -> OpenChain:
    """A chain with these tables, whose numbers are not read."""
    bundle = Bundle.open(path)
    chain = replace(CHAINS[I2I], tables=dict(tables), defaults=defaults)
    return replace(bundle, manifest=replace(bundle.manifest, chains={I2I: chain})).open_chain()


@pytest.fixture(scope="module")
def late(small: Path) -> OpenChain:
    return chain_of(small, LATE, guidance_scale=0.0, strength=0.3)


def made_by_diffusers(steps: int, strength: float) -> int:
    """How many steps StableDiffusionImg2ImgPipeline makes."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    pipeline: Any = SimpleNamespace(scheduler=scheduler)
    return int(StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[1])


@pytest.mark.parametrize("steps", STEPS)
def test_a_strength_skips_the_steps_that_diffusers_skips(late: OpenChain, steps: int) -> None:
    for strength in (*STRENGTHS, *OF_NUMPY):
        made = made_by_diffusers(steps, strength)
        if made:
            assert table_of(late, steps, strength, 0.0) == f"{steps} begin {steps - made}", strength
            continue
        with pytest.raises(InputError) as caught:
            table_of(late, steps, strength, 0.0)
        said = str(caught.value)
        if not strength:
            assert said == "strength=0.0 makes no step: a larger one was expected"
            continue
        least = next(n for n in range(1, 200) if made_by_diffusers(n, strength))
        assert f"num_inference_steps={steps} at strength={strength} makes no step: at least {least} steps" in said
        assert ("--steps" in said) == (least not in STEPS)


def test_the_product_is_that_of_floats(late: OpenChain) -> None:
    """0.58·50 is 28.999…, of which diffusers makes 28 steps, and not 29."""
    assert table_of(late, 50, 0.58, 0.0) == "50 begin 22"


def test_what_is_not_given(late: OpenChain, small: Path) -> None:
    """The strength is the bundle's; the steps are the fewest of which one is made."""
    assert table_of(late, 50, None, 0.0) == "50 begin 35"
    assert table_of(late, None, None, 0.0) == "4 begin 3"
    assert table_of(late, None, 0.5, 0.0) == "2 begin 1"
    assert table_of(late, None, 1, 0.0) == "1 begin 0"
    with pytest.raises(InputError, match=r"num_inference_steps=1 at strength=0\.01 makes no step: at least 100 steps"):
        table_of(late, None, 0.01, 0.0)
    with pytest.raises(InputError, match="=9: this bundle was built for these step counts: 1, 2, 3, 4, 7, 50;"):
        table_of(late, 9, 0.01, 0.0)  # which is what helps


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "0.5", True, [0.5]])
def test_a_strength_that_is_none(late: OpenChain, strength: Any) -> None:
    with pytest.raises(InputError, match="a number from 0 to 1 was expected"):
        table_of(late, 4, strength, 0.0)


def test_a_chain_without_an_image_has_no_strength(small: Path) -> None:
    chain = Bundle.open(small).open_chain("text-to-image")
    assert (table_of(chain, None, None, 0.0), table_of(chain, 3, None, 0.0)) == ("2", "3")
    with pytest.raises(InputError, match="strength was given, and the chain text-to-image starts from no image"):
        table_of(chain, 2, 0.5, 0.0)


def test_timesteps_that_depend_on_the_strength(small: Path) -> None:
    """LatentConsistencyModelImg2ImgPipeline makes all steps at any strength: each has a table of its own."""
    tables = {f"{n}/{s}": TableEntry(n, n, 0, None, s) for n in (1, 4) for s in (0.5, 0.8)}
    chain = chain_of(small, tables, strength=0.8)
    assert [table_of(chain, *of, 0.0) for of in ((4, 0.5), (None, 0.5), (4, None))] == ["4/0.5", "1/0.5", "4/0.8"]
    with pytest.raises(InputError, match=r"strength=0\.6: the tables of .* 0\.5, 0\.8; .* SOURCE --strengths$"):
        table_of(chain, 4, 0.6, 0.0)


def test_columns_that_depend_on_the_guidance_scale(small: Path) -> None:
    """A UNet that reads the scale has no classifier-free guidance, as diffusers' pipeline has it."""
    tables = {f"{n}/{g}/{b}": TableEntry(n, n - b, b, g) for n in (1, 2) for g in (1.0, 8.5) for b in range(n)}
    chain = chain_of(small, tables, guidance_scale=8.5, strength=1.0)
    assert guidance.embeds_guidance(chain)
    for given, scale in ((None, 8.5), (8.5, 8.5), (1, 1.0)):
        found = guidance.check_scale(chain, given)
        assert (found, table_of(chain, 2, 0.5, found)) == (scale, f"2/{scale}/1")
        assert guidance.modes_of(chain, found, "ugly", ()) == frozenset()
    config = SimpleNamespace(time_cond_proj_dim=256)
    theirs: Any = SimpleNamespace(_guidance_scale=8.5, unet=SimpleNamespace(config=config))
    assert LatentConsistencyModelPipeline.do_classifier_free_guidance.fget(theirs) is False
    with pytest.raises(InputError, match=r"guidance_scale=7\.0: the tables of .* 1\.0, 8\.5; .* --guidance-scales$"):
        table_of(chain, 2, 0.5, guidance.check_scale(chain, 7))
