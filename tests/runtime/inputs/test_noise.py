"""The noise against PyTorch's own CPU generator and diffusers' own `randn_tensor`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from turbochain.runtime import Bundle
from turbochain.runtime.bundle.manifest import Draw
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.generators import advance
from turbochain.runtime.inputs.noise import Generator, draw, draw_run

TOLERANCE = 1e-6
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63, 2**64 - 1]

# Every residue mod 16 at several magnitudes up to 100,000; then the blocks' edges and a real latent.
SPREAD = [16 * blocks + residue for blocks in (7, 64, 999, 6249) for residue in range(16)] + [
    100_000,
    4 * 64 * 64,
]

# Odd small draws leave a cached half behind; large ones come between and must not touch it.
MIXED = [3, 16_384, 1, 5, 0, 17, 7, 100_003, 2, 1, 15, 31, 15, 0, 1, 16, 9]


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == tuple(theirs.shape)
    worst = np.abs(ours - theirs.numpy()).max(initial=0)
    assert worst <= TOLERANCE, f"differs by {worst} at shape {ours.shape}"


@pytest.mark.parametrize("seed", SEEDS)
def test_every_length_to_100(seed):
    for length in range(101):
        assert_same(Generator(seed).randn(length), torch.randn(length, generator=torch_generator(seed)))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**64 - 1])
def test_lengths_to_100_000(seed):
    for length in SPREAD:
        assert_same(Generator(seed).randn(length), torch.randn(length, generator=torch_generator(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_share_one_stream(seed):
    ours, theirs = Generator(seed), torch_generator(seed)
    for length in MIXED:
        assert_same(ours.randn(length), torch.randn(length, generator=theirs))


def test_random_runs_of_draws():
    random = np.random.default_rng(0)
    for seed in random.integers(0, 2**64, 40, dtype=np.uint64).tolist():
        ours, theirs = Generator(seed), torch_generator(seed)
        for length in random.choice([1, 3, 7, 15, 16, 17, 33, 1000], 20).tolist():
            assert_same(ours.randn(length), torch.randn(length, generator=theirs))


@pytest.mark.parametrize("seed", SEEDS)
def test_below_16_values_is_exact(seed):
    theirs = torch.randn(15, generator=torch_generator(seed))
    np.testing.assert_array_equal(Generator(seed).randn(15), theirs.numpy())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 4, 64, 64), (3, 4, 5, 7), (2, 0, 4), (1, 4, 128, 96)])
def test_shapes(shape):
    assert_same(Generator(7).randn(*shape), torch.randn(shape, generator=torch_generator(7)))


def test_seeds_of_numpy_integers():
    for seed in (np.int64(5), np.uint64(2**64 - 1), np.uint8(200)):
        np.testing.assert_array_equal(Generator(seed).randn(20), Generator(int(seed)).randn(20))


def test_the_global_numpy_state_is_left_alone():
    np.random.seed(3)
    expected = np.random.random(4)
    np.random.seed(3)
    Generator(1).randn(100)
    np.testing.assert_array_equal(np.random.random(4), expected)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 8, 8), (3, 1, 1, 5), (2, 3, 5, 7)])
def test_draw_with_one_generator(shape):
    ours, theirs = Generator(11), torch_generator(11)
    for _ in range(3):
        assert_same(draw([ours], shape), randn_tensor(shape, generator=theirs))
        assert_same(draw([ours], shape), randn_tensor(shape, generator=[theirs]))


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 1, 1, 5), (3, 3, 5, 7)])
def test_draw_with_a_generator_for_each_image(shape):
    seeds = [11, 2**40, 11]
    ours, theirs = [Generator(seed) for seed in seeds], [torch_generator(seed) for seed in seeds]
    for _ in range(3):
        assert_same(draw(ours, shape), randn_tensor(shape, generator=theirs))


def test_one_generator_twice_in_the_list():
    ours, theirs = Generator(4), torch_generator(4)
    assert_same(draw([ours, ours], (2, 1, 1, 3)), randn_tensor((2, 1, 1, 3), generator=[theirs, theirs]))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_draw_refuses_another_number_of_generators(count):
    with pytest.raises(InputError) as caught:
        draw([Generator(0)] * count, (3, 4, 8, 8))
    assert str(caught.value) == (
        f"{count} generators were given for a batch of 3: expected one for the whole batch, "
        "or one for each of its images."
    )


@pytest.mark.parametrize(
    ("seed", "shown"),
    [
        (-1, "-1"),
        (2**64, "18446744073709551616"),
        (np.int64(-3), "-3"),
        (True, "True"),
        (np.True_, "True"),
        (1.0, "1.0"),
        (float("nan"), "nan"),
        ("7", "'7'"),
        (None, "None"),
        ([1], "[1]"),
    ],
)
def test_bad_seeds(seed, shown):
    with pytest.raises(InputError) as caught:
        Generator(seed)
    message = str(caught.value)
    assert message.startswith("the seed is ") and shown in message.split(": expected")[0]
    assert message.endswith("expected an integer from 0 to 2**64-1 (18446744073709551615)")


def test_the_message_for_a_huge_seed_is_short():
    with pytest.raises(InputError) as caught:
        Generator(10**1000)
    assert len(str(caught.value)) < 200


def test_a_generator_that_is_seeded_again_begins_anew():
    used = Generator(3)
    used.randn(5)  # an odd number of small draws leaves one waiting
    assert used.manual_seed(7) is used
    theirs = torch.Generator("cpu").manual_seed(7)
    for shape in ((3,), (1, 4, 8, 8), (2,)):
        np.testing.assert_allclose(used.randn(*shape), torch.randn(shape, generator=theirs).numpy(), atol=1e-6)
    with pytest.raises(InputError, match="seed"):
        used.manual_seed(-1)


@pytest.mark.parametrize("lengths", [[1], [2], [3, 16], [1000], [5, 17, 4], []])
def test_a_callers_generator_goes_on_where_ours_ended(lengths):
    """Also after an odd number of small draws, which leaves a value waiting."""
    ours, theirs, callers = Generator(9), torch_generator(9), torch_generator(9)
    for length in lengths:
        ours.randn(length)
        torch.randn(length, generator=theirs)
    advance(callers, ours)
    for length in (3, 20, 1):
        assert torch.equal(torch.randn(length, generator=callers), torch.randn(length, generator=theirs))


LATENTS, NOISE = Draw("latents", "picture"), Draw("noise", "picture")


def drawing(bundle: Path, *draws: Draw) -> OpenChain:
    """The chain of a bundle with other draws."""
    opened = Bundle.open(bundle)
    chain = replace(opened.manifest.chains["text-to-image"], draws=draws)
    return Bundle(bundle, replace(opened.manifest, chains={"text-to-image": chain})).open_chain()


def generators(each: bool, count: int) -> tuple[list[Generator], list[torch.Generator]]:
    seeds = range(5, 5 + count) if each else [5]
    return [Generator(seed) for seed in seeds], [torch_generator(seed) for seed in seeds]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_draws_in_the_chains_order(sdxl: Path, each: bool, steps: int) -> None:
    """The latents, then the noise of every row that draws."""
    chain = drawing(sdxl, LATENTS, NOISE)
    table, shape, count = chain.tables[str(steps)], (4, *chain.tensors["latents"].shape[1:]), 4
    ours, theirs = generators(each, count)
    made = draw_run(chain, table, ours, count)
    assert made.keys() == {"latents", "noise"} and made["noise"].shape == (table.rows, *shape)
    assert_same(made["latents"] / table.init_noise_sigma, randn_tensor(shape, generator=theirs))
    for row, draws in zip(made["noise"], table.draws_noise, strict=True):
        assert_same(row, randn_tensor(shape, generator=theirs) if draws else torch.zeros(shape))
    assert table.draws_noise.sum() == steps - 1  # Euler ancestral, whose last draw nothing notices


def test_a_discarded_draw_takes_its_values_from_the_stream(sd: Path) -> None:
    chain = drawing(sd, Draw("prediction", "picture", discarded=True), LATENTS, NOISE)
    made = draw_run(chain, chain.tables["1"], [Generator(3)], 2)
    theirs, shape = torch_generator(3), (2, *chain.tensors["latents"].shape[1:])
    randn_tensor(shape, generator=theirs)
    assert made.keys() == {"latents", "noise"}
    assert_same(made["latents"] / chain.tables["1"].init_noise_sigma, randn_tensor(shape, generator=theirs))


def test_a_discarded_draw_leaves_what_was_drawn_for_that_feed(sd: Path) -> None:
    chain = drawing(sd, LATENTS, replace(LATENTS, discarded=True), NOISE)
    made, shape = draw_run(chain, chain.tables["1"], [Generator(3)], 2), (2, *chain.tensors["latents"].shape[1:])
    assert_same(made["latents"] / chain.tables["1"].init_noise_sigma, randn_tensor(shape, generator=torch_generator(3)))


def test_for_what_is_given_nothing_is_drawn(sdxl: Path) -> None:
    chain = drawing(sdxl, LATENTS, NOISE)
    given = np.full((2, *chain.tensors["latents"].shape[1:]), 0.5, np.float32)
    made = draw_run(chain, chain.tables["2"], [Generator(3)], 2, given={"latents": given})
    np.testing.assert_array_equal(made["latents"], chain.tables["2"].init_noise_sigma * given)
    assert_same(made["noise"][0], randn_tensor(given.shape, generator=torch_generator(3)))


@pytest.mark.parametrize("each", [False, True])
def test_a_draw_per_image_is_repeated_if_one_generator_draws_it(sd: Path, each: bool) -> None:
    """As diffusers encodes two images for four pictures."""
    chain = drawing(sd, Draw("latents", "image"), NOISE)
    ours, theirs = generators(each, 4)
    made = draw_run(chain, chain.tables["1"], ours, 4, images=2)["latents"] / chain.tables["1"].init_noise_sigma
    shape = chain.tensors["latents"].shape[1:]
    drawn = randn_tensor((4 if each else 2, *shape), generator=theirs)
    assert_same(made, drawn if each else torch.cat([drawn, drawn]))
