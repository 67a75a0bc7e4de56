"""The chain that suits a call: of its task, its size and its number of pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from small_bundle import CHAINS
from small_graphs import I2I, T2I

from turbochain.runtime import Bundle, InputError
from turbochain.runtime.choice import chain_of, pictures_of

SIZES = {T2I: [(64, 64), (48, 96)], I2I: [(64, 64), (48, 96), (128, 128)]}
BATCHES = (2, 1, 4)


@pytest.fixture(scope="module")
def bundle(small: Path) -> Bundle:
    """Chains of two tasks, several sizes and batches; only their entries are read."""
    opened = Bundle.open(small)
    chains = {
        f"{task} {height}x{width} {batch}": replace(CHAINS[task], size=(height, width), batch=batch)
        for task, sizes in SIZES.items()
        for height, width in sizes
        for batch in BATCHES
    }
    return replace(opened, manifest=replace(opened.manifest, chains=chains))


def picture(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 4), (9, 4)])
def test_the_fewest_pictures_per_pass_that_are_enough(bundle: Bundle, count: int, batch: int) -> None:
    """If none are, the most."""
    assert chain_of(bundle, count) == f"{T2I} 64x64 {batch}"
    assert bundle.find_chain(I2I, (48, 96), count) == f"{I2I} 48x96 {batch}"


def test_the_task_is_that_of_the_arguments(bundle: Bundle) -> None:
    assert chain_of(bundle) == f"{T2I} 64x64 1"
    assert chain_of(bundle, image=picture(64, 64)) == f"{I2I} 64x64 1"
    with pytest.raises(InputError, match=f"built for {T2I}, {I2I}, and not for inpainting: .* --tasks inpainting$"):
        chain_of(bundle, image=picture(64, 64), mask_image=picture(64, 64))


@pytest.mark.parametrize("size", [(64, 64), (71, 64), (48, 96), (55, 103), (135, 131), (47, 96), (256, 256), (9, 8)])
@pytest.mark.parametrize("kind", ["PIL", "array", "list"])
def test_an_image_has_its_own_size_if_there_is_a_chain_of_it(bundle: Bundle, size: tuple[int, int], kind: str) -> None:
    """Its size is what diffusers draws; otherwise that of the first chain is drawn."""
    image: Any = picture(*size) if kind == "PIL" else np.zeros((*size, 3), np.uint8)
    image = [image, picture(64, 64)] if kind == "list" else image
    theirs = VaeImageProcessor().get_default_height_width(torch.zeros(1, 3, *size))
    height, width = theirs if theirs in SIZES[I2I] else (64, 64)
    assert chain_of(bundle, image=image) == f"{I2I} {height}x{width} 1"


def test_height_and_width_win_over_the_image(bundle: Bundle) -> None:
    assert chain_of(bundle, height=48, width=96) == f"{T2I} 48x96 1"
    assert chain_of(bundle, 3, image=picture(48, 96), height=128, width=128) == f"{I2I} 128x128 4"
    assert chain_of(bundle, image=picture(48, 96), height=64) == f"{I2I} 64x64 1"  # the other side is the first's
    with pytest.raises(InputError, match=r"height=128, width=128: .* built for 64x64, 96x48; .* --size 128x128$"):
        chain_of(bundle, height=128, width=128)
    with pytest.raises(InputError, match=r"height=48, width=64: .* built for 64x64, 96x48, 128x128; .* --size 64x48$"):
        chain_of(bundle, image=picture(48, 96), height=48)


@pytest.mark.parametrize(
    ("prompt", "repeats", "count"),
    [("a", 1, 1), ("abc", 2, 2), (["a", "b"], 1, 2), (("a", "b", "c"), 2, 6), (None, 3, 3), ([], 2, 0), ("a", None, 1)],
)
def test_how_many_pictures_a_call_makes(prompt: object, repeats: object, count: int) -> None:
    assert pictures_of(prompt, None, repeats) == count


@pytest.mark.parametrize(("embeds", "count"), [(np.zeros((3, 77, 8)), 6), (np.float32(1), 2), (np.array(1), 2)])
def test_embeds_are_pictures_too(embeds: object, count: int) -> None:
    assert pictures_of(None, embeds, 2) == count
