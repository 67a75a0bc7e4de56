"""Image-to-image against diffusers' own pipelines: SD-Turbo, SDXL-Turbo, and SD-Turbo with AutoencoderTiny."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import image_calls
import image_graphs
import numpy as np
import pytest
import torch
from conftest import ON, SIZE, called
from here import build_here
from image_calls import FEW, PAIRS, Pairs, assert_same, compared, ours, picture, prompts, seeded, theirs
from PIL import Image

from turbochain.runtime import InputError, Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Made:
    """A bundle's pipeline, and diffusers' for image-to-image."""

    name: str
    ours: Pipeline
    theirs: Any

    @property
    def batch(self) -> int:
        return self.ours.bundle.open_chain("image-to-image").batch

    def check(self, call: dict[str, Any]) -> None:
        assert_same(ours(self.ours, call), theirs(self.theirs, call))


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD miniature with an AutoencoderTiny, which lies beside the bundle."""
    folder = tmp_path_factory.mktemp("tiny")
    image_graphs.tiny_vae(folder / "vae")
    how: dict[str, Any] = {"precision": "fp32", "size": SIZE, "tasks": ["image-to-image"], "quiet": True, **ON}
    vae = {"vae": str(folder / "vae")}
    build_here(str(checkpoints["sd"]), folder / "tiny.bundle", **how, **vae)
    return folder / "tiny.bundle"


@pytest.fixture(scope="module", params=["sd", "sdxl", pytest.param("tiny", marks=pytest.mark.full)])
def made(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Made]:
    name, bundle = request.param, request.getfixturevalue(request.param)
    family = "sdxl" if name == "sdxl" else "sd"
    reference, _ = image_graphs.pipelines(checkpoints[family], family)
    if name == "tiny":
        reference.vae = diffusers.AutoencoderTiny.from_pretrained(bundle.parent / "vae")
    with Pipeline.load(bundle, chain="image-to-image") as pipe:
        yield Made(name, pipe, reference)


def compare(made: Made, pairs: Pairs, seeds: int) -> image_calls.Apart:
    """Compare calls of these step counts and strengths; every seed has a prompt and a picture of its own."""
    with compared() as apart:
        for steps, rows in pairs:
            for first in range(0, seeds, made.batch):
                count = min(made.batch, seeds - first)
                call = {
                    "prompt": prompts(first + steps, count),
                    "image": [picture(first + i + 10 * steps) for i in range(count)],
                    "strength": image_calls.strength(steps, rows),
                    "num_inference_steps": steps,
                    "seed": [first + i for i in range(count)],
                }
                apart.add(ours(made.ours, call), theirs(made.theirs, call))
    return apart


def test_step_counts_and_strengths(made: Made) -> None:
    compare(made, FEW, 1)


@pytest.mark.full
def test_every_step_count_and_strength_with_ten_seeds(made: Made) -> None:
    print(f"\nimage-to-image {made.name}: {compare(made, PAIRS, 10)!r}")


def _arguments() -> dict[str, dict[str, Any]]:
    """Each argument that decides which noise and which image a picture gets; of bundles of 1 and 3, the last pass of
    the second is short."""
    four = {"num_inference_steps": 2, "strength": 0.5, "prompt": prompts(0, 4), "seed": 3}
    two = {**four, "prompt": prompts(4, 2), "num_images_per_prompt": 2}
    images = [picture(i) for i in range(4)]
    each = {"seed": [9, 2**64 - 1, 7, 6]}
    return {
        "one generator": {**four, "image": images},
        "one generator each": {**four, "image": images, **each},
        "one image for all": {**four, "image": images[0]},
        "one image for all, one generator each": {**four, "image": images[:1], **each},
        "two images for four prompts": {**four, "image": images[:2]},
        "two images for two prompts, two of each": {**two, "image": images[:2]},
        "two images, two of each, one generator each": {**two, "image": images[:2], **each},
        "a list of one generator": {**four, "prompt": ["a cat"], "image": images[0], "seed": [5]},
        "latents are returned": {**four, "image": images, "output_type": "latent"},
        "sizes that are no multiple of 8": {**four, "image": picture(1, (67, 71))},
        "an array": {**four, "image": np.asarray(images[0], np.float32)[None] / 255},
    }


OF_ONE = ("one generator", "one image for all, one generator each", "latents are returned")


@pytest.mark.parametrize("name", _arguments())
def test_arguments_mean_what_they_mean_in_diffusers(made: Made, name: str) -> None:
    if made.name == "sd" and name not in OF_ONE:
        pytest.skip("SDXL's chain, of several pictures per pass, is enough")
    made.check(_arguments()[name])


def test_the_default_strength(made: Made) -> None:
    """With it SD makes 3 of 4 steps, SDXL 1; without a step count the fewest that make one."""
    call = {"prompt": "a cat", "image": picture(0), "seed": 3}
    made.check({**call, "num_inference_steps": 4})
    least = 4 if made.name == "sdxl" else 2
    np.testing.assert_array_equal(ours(made.ours, call), ours(made.ours, {**call, "num_inference_steps": least}))


def test_a_strength_just_below_one_leaves_a_step_out(made: Made) -> None:
    call = {"prompt": "a cat", "image": picture(0), "seed": 3, "num_inference_steps": 3}
    made.check({**call, "strength": 0.999})
    assert (ours(made.ours, {**call, "strength": 0.999}) != ours(made.ours, {**call, "strength": 1.0})).any()


def test_no_step_is_an_error_that_names_the_least_count(made: Made) -> None:
    call = {"prompt": "a cat", "image": picture(0), "seed": 3}
    for steps, given, least in ((1, 0.999, "2 steps"), (1, 0.5, "2 steps"), (3, 0.3, "4 steps")):
        with pytest.raises(InputError, match=f"makes no step: at least {least} or a larger strength was expected"):
            ours(made.ours, {**call, "num_inference_steps": steps, "strength": given})
    with pytest.raises(InputError, match=r"at least 10 steps \(build another bundle with .* --steps\)"):
        ours(made.ours, {**call, "strength": 0.1})
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        theirs(made.theirs, {**call, "num_inference_steps": 1, "strength": 0.5})


def test_another_size_is_drawn_in_the_built_one_and_said(made: Made) -> None:
    """diffusers draws an image's own size, so it is given one that PIL has resized."""
    given = picture(2, (131, 135))
    call = {"prompt": "a cat", "strength": 0.5, "num_inference_steps": 2, "seed": 3}
    out = made.ours(**call, image=given, guidance_scale=0.0, output_type="uint8")
    assert out.resized == (135, 131)
    assert_same(out.images, theirs(made.theirs, {**call, "image": given.resize(SIZE, Image.Resampling.LANCZOS)}))
    assert made.ours(**call, image=picture(2), guidance_scale=0.0).resized is None


def test_images_are_encoded_once(made: Made) -> None:
    """For all strengths and step counts, if the noise is the same."""
    ran: list[str] = []
    call = {"prompt": "a cat", "image": picture(77), "seed": 5, "num_inference_steps": 4, "strength": 0.25}
    first = ours(made.ours, {**call, "observe": lambda graph, _: ran.append(graph)})
    assert ran.count("vae_encoder") == 1
    for more in ({}, {"strength": 0.75}, {"num_inference_steps": 2, "strength": 1.0}):
        ours(made.ours, {**call, **more, "observe": lambda graph, _: ran.append(graph)})
    assert ran.count("vae_encoder") == 1
    np.testing.assert_array_equal(ours(made.ours, call), first)
    ours(made.ours, {**call, "image": picture(78), "observe": lambda graph, _: ran.append(graph)})
    assert ran.count("vae_encoder") == 2


@pytest.mark.parametrize("seed", [4, [4, 5]], ids=["one", "one for each picture"])
def test_generators_end_after_what_was_drawn(made: Made, seed: Any) -> None:
    """SDXL-Turbo's sampler also draws after the last step, where nothing notices it."""
    call = {"prompt": prompts(0, 2), "image": picture(0), "num_inference_steps": 3, "strength": 0.7}
    mine, other = seeded(seed), seeded(seed)
    assert_same(ours(made.ours, {**call, "generator": mine}), theirs(made.theirs, {**call, "generator": other}))
    several = isinstance(seed, list)
    for one, reference in zip(mine if several else [mine], other if several else [other], strict=True):
        if made.name == "sdxl":
            torch.randn(1 if several else 2, 4, SIZE[1] // 8, SIZE[0] // 8, generator=one)
        assert torch.equal(one.get_state(), reference.get_state())


def test_latents_are_refused(made: Made) -> None:
    """diffusers' pipeline for SD has no such argument, and that for SDXL would leave the image out."""
    latents = np.zeros((1, 4, SIZE[1] // 8, SIZE[0] // 8), np.float32)
    with pytest.raises(
        InputError, match="latents was given, and the chain image-to-image begins with an image; leave it out"
    ):
        ours(made.ours, {"prompt": "a cat", "image": picture(0), "latents": latents, "seed": 3})


def test_images_that_are_refused(made: Made) -> None:
    call: dict[str, Any] = {"prompt": ["a cat"] * 4, "seed": 3, "chain": "image-to-image"}
    with pytest.raises(InputError, match="image is missing, and the chain image-to-image reads one; give a picture"):
        ours(made.ours, call)
    with pytest.raises(
        InputError, match="image has 3, and 4 are drawn: give one, one for each, or a number that divides 4"
    ):
        ours(made.ours, {**call, "image": [picture(0)] * 3})


def test_the_command(made: Made, tmp_path: Path) -> None:
    """From a file with transparency, turned by its EXIF orientation, of a size that is not built."""
    if made.name != "sd":
        pytest.skip("one command is enough")
    file, exif = tmp_path / "in.png", Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = picture(3, (100, 80)).convert("RGBA")
    turned.putalpha(picture(4, (100, 80)).convert("L"))
    turned.save(file, exif=exif)
    options = ("--image", file, "--strength", 0.5, "--steps", 2, "--seed", 3, "-o", tmp_path / "out.png")
    done = called("turbochain", "generate", made.ours.bundle.path, "a cat", *options)
    assert done.returncode == 0, done.stderr
    assert "in.png: 80x100, drawn as 64x64" in done.stderr
    given = diffusers.utils.load_image(str(file)).resize(SIZE, Image.Resampling.LANCZOS)
    call = {"prompt": "a cat", "image": given, "strength": 0.5, "num_inference_steps": 2, "seed": 3}
    assert_same(np.asarray(Image.open(tmp_path / "out.png"))[None], theirs(made.theirs, call))
