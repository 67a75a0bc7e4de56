"""Inpainting with a 4-channel UNet against diffusers' own pipelines; samplers carry one tensor or several."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_calls
import image_graphs
import numpy as np
import pytest
import torch
from conftest import BATCH, ON, SIZE, BundleFactory, called
from here import build_here
from image_calls import FEW, PAIRS, Pairs, assert_same, compared, mask, ours, picture, prompts, seeded, theirs
from PIL import Image
from test_schedulers import CASES, SD15, Case, checkpoint_with

from turbochain.export import tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Shape
from turbochain.export.sources.checkpoint import open_folder
from turbochain.runtime import InputError, Pipeline
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, INPAINTING

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLERS = {
    "Euler": Case("EulerDiscreteScheduler", SD15, 1, {}),
    "Euler a": Case("EulerAncestralDiscreteScheduler", SD15, 1, {}),
    **{name: CASES[name] for name in ("DPM++ 2M", "UniPC", "PNDM")},
}
SIZES = {"width": SIZE[0], "height": SIZE[1]}


@dataclass(frozen=True)
class Made:
    """A bundle's pipeline, and diffusers' for inpainting."""

    family: str
    ours: Pipeline
    theirs: Any

    @property
    def batch(self) -> int:
        return self.ours.bundle.open_chain().batch

    def check(self, call: dict[str, Any]) -> None:
        assert_same(ours(self.ours, call), theirs(self.theirs, call, **SIZES))


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest,
    bundle_of: BundleFactory,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Made]:
    """The parameter: the family, and one of `SAMPLERS` or "own"."""
    family, name = request.param
    folder, checkpoint = tmp_path_factory.mktemp("inpainting"), checkpoints[family]
    if name != "own":
        checkpoint = checkpoint_with(SAMPLERS[name], checkpoint, folder / "checkpoint")
    how: dict[str, Any] = {"size": SIZE, "batch": BATCH[family, "fp32"], "tasks": ["inpainting"], "quiet": True, **ON}
    steps = (1, 2, 3, 4) if name == "own" else (1, 2, 3, 4, 8)  # PNDM has its whole history after four steps
    build_here(str(checkpoint), folder / "x.bundle", precision="fp32", steps=steps, **how)
    _, reference = image_graphs.pipelines(checkpoint, family)
    with Pipeline.load(folder / "x.bundle") as pipe:
        assert name == "own" or pipe.bundle.open_chain().chain.K == SAMPLERS[name].K
        yield Made(family, pipe, reference)


QUICK = pytest.mark.parametrize(
    "made", [("sdxl", "own"), pytest.param(("sd", "own"), marks=pytest.mark.full)], indirect=True, ids=" ".join
)
EVERY = [(family, name) for family in ("sd", "sdxl") for name in SAMPLERS]


def compare(made: Made, pairs: Pairs, seeds: int) -> image_calls.Apart:
    """Compare calls of these step counts and strengths; every seed has a prompt, a picture and a mask of its own."""
    with compared() as apart:
        for steps, rows in pairs:
            for first in range(0, seeds, made.batch):
                count = min(made.batch, seeds - first)
                numbers = [first + i + 10 * steps for i in range(count)]
                call = {
                    "prompt": prompts(first + steps, count),
                    "image": [picture(n) for n in numbers],
                    "mask_image": [mask(n) for n in numbers],
                    "strength": image_calls.strength(steps, rows),
                    "num_inference_steps": steps,
                    "seed": [first + i for i in range(count)],
                }
                apart.add(ours(made.ours, call), theirs(made.theirs, call, **SIZES))
    return apart


@QUICK
def test_step_counts_and_strengths(made: Made) -> None:
    compare(made, FEW, 1)


@pytest.mark.full
@pytest.mark.parametrize("made", EVERY, indirect=True, ids=" ".join)
def test_every_step_count_and_strength_with_ten_seeds(made: Made, request: pytest.FixtureRequest) -> None:
    print(f"\ninpainting {request.node.callspec.id}: {compare(made, [*PAIRS, (8, 6)], 10)!r}")


def _arguments() -> dict[str, dict[str, Any]]:
    """Each argument that decides which noise, image and mask a picture gets."""
    four = {"num_inference_steps": 3, "strength": 0.7, "prompt": prompts(0, 4), "seed": 3}
    two = {**four, "prompt": prompts(4, 2), "num_images_per_prompt": 2}
    images, masks = [picture(i) for i in range(4)], [mask(i) for i in range(4)]
    each = {"seed": [9, 2**64 - 1, 7, 6]}
    latents = np.random.default_rng(0).standard_normal((4, 4, SIZE[1] // 8, SIZE[0] // 8)).astype(np.float32)
    return {
        "one generator": {**four, "image": images, "mask_image": masks},
        "one image for all": {**four, "image": images[0], "mask_image": masks[0]},
        "one image for all, one generator each": {**four, "image": images[0], "mask_image": masks[0], **each},
        "one image, four masks, one generator each": {**four, "image": images[0], "mask_image": masks, **each},
        "one image, two masks": {**four, "image": images[0], "mask_image": masks[:2]},
        "two images and masks, two of each": {**two, "image": images[:2], "mask_image": masks[:2]},
        "two of each, one generator each": {**two, "image": images[:2], "mask_image": masks[:2], **each},
        "latents": {**four, "image": images[0], "mask_image": masks[0], "latents": latents},
        "latents are returned": {**four, "image": images, "mask_image": masks, "output_type": "latent"},
        "other sizes": {**four, "image": picture(1, (131, 135)), "mask_image": mask(2, (50, 70))},
        "arrays of four images and one mask": {
            **four,
            "image": np.stack([np.asarray(image, np.float32) for image in images]) / 255,
            "mask_image": np.asarray(masks[0], np.float32) / 255,
        },
    }


@QUICK
@pytest.mark.parametrize("name", _arguments())
def test_arguments_mean_what_they_mean_in_diffusers(made: Made, name: str) -> None:
    made.check(_arguments()[name])


@QUICK
def test_strengths_at_the_upper_end(made: Made) -> None:
    """The defaults, 1 of SD's and 0.9999 of SDXL's pipeline, and one just below 1, which leaves a step out."""
    call = {"prompt": "a cat", "image": picture(0), "mask_image": mask(0), "seed": 3, "num_inference_steps": 3}
    made.check(call)
    made.check({**call, "strength": 0.999})
    assert (ours(made.ours, {**call, "strength": 0.999}) != ours(made.ours, {**call, "strength": 1.0})).any()
    with pytest.raises(InputError, match="makes no step: at least 2 steps or a larger strength was expected"):
        ours(made.ours, {**call, "strength": 0.999, "num_inference_steps": 1})


@QUICK
def test_where_the_mask_is_black_the_image_stays(made: Made) -> None:
    """As the VAE decodes it; and a mask that is white everywhere keeps nothing of it, at full strength."""
    call = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2, "strength": 1.0, "output_type": "latent"}
    black, white = (Image.new("L", SIZE, level) for level in (0, 255))
    kept = [ours(made.ours, {**call, "prompt": p, "image": picture(0), "mask_image": black}) for p in ("a", "b")]
    np.testing.assert_array_equal(*kept)
    drawn = [ours(made.ours, {**call, "image": picture(i), "mask_image": white}) for i in (0, 1)]
    np.testing.assert_array_equal(*drawn)
    assert (kept[0] != drawn[0]).any()


@QUICK
@pytest.mark.parametrize("seed", [4, [4, 5]], ids=["one", "one for each picture"])
def test_generators_end_after_what_was_drawn(made: Made, seed: Any) -> None:
    """SDXL-Turbo's sampler also draws after the last step, where nothing notices it."""
    call = {"prompt": prompts(0, 2), "image": picture(0), "mask_image": [mask(0), mask(1)]}
    call |= {"num_inference_steps": 2, "strength": 0.7}
    mine, other = seeded(seed), seeded(seed)
    result = ours(made.ours, {**call, "generator": mine})
    assert_same(result, theirs(made.theirs, {**call, "generator": other}, **SIZES))
    several = isinstance(seed, list)
    for one, reference in zip(mine if several else [mine], other if several else [other], strict=True):
        if made.family == "sdxl":
            torch.randn(1 if several else 2, 4, SIZE[1] // 8, SIZE[0] // 8, generator=one)
        assert torch.equal(one.get_state(), reference.get_state())


@QUICK
def test_a_mask_and_an_image_are_expected(made: Made) -> None:
    for given, missing in (("image", "mask_image"), ("mask_image", "image")):
        with pytest.raises(InputError, match=f"^{missing} is missing, and the chain inpainting reads one"):
            ours(made.ours, {"prompt": "a cat", given: picture(0), "seed": 3, "chain": "inpainting"})


@QUICK
def test_the_command(made: Made, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "in.png")
    mask(3, (90, 60)).save(tmp_path / "mask.png")
    options = ("--image", tmp_path / "in.png", "--mask-image", tmp_path / "mask.png", "--strength", 0.5)
    line = (made.ours.bundle.path, "a cat", *options, "--steps", 4, "--seed", 3, "-o", tmp_path / "out.png")
    done = called("turbochain", "generate", *line)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    call = {"prompt": "a cat", "image": picture(3), "mask_image": mask(3, (90, 60))}
    call |= {"strength": 0.5, "num_inference_steps": 4, "seed": 3}
    assert_same(np.asarray(Image.open(tmp_path / "out.png"))[None], theirs(made.theirs, call, **SIZES))


NORMALIZED = {"latents_mean": [0.4, -0.7, 1.1, 0.2], "latents_std": [0.5, 1.8, 0.9, 1.3]}


@pytest.mark.parametrize(
    ("family", "config", "modules"),
    [
        ("sdxl", NORMALIZED, {"vae_encoder": "SDXLVaeEncoder", "vae_encoder+plain": "VaeEncoder"}),
        ("sdxl", {"latents_mean": NORMALIZED["latents_mean"]}, {"vae_encoder": "SDXLVaeEncoder"}),
        ("sdxl", {}, {"vae_encoder": "SDXLVaeEncoder"}),
        ("sd", NORMALIZED, {"vae_encoder": "VaeEncoder"}),
    ],
)
def test_the_encoders_of_a_bundle_for_both_tasks(
    family: str, config: dict[str, Any], modules: dict[str, str], checkpoints: dict[str, Path]
) -> None:
    """diffusers' SDXL pipeline for inpainting does not normalize an image's latents, its others do."""
    opened = open_folder(checkpoints[family], None)
    configs = {**opened.configs, "vae": {**opened.configs["vae"], **config}}
    layout = Layout(opened.family, configs, tasks.find([IMAGE_TO_IMAGE, INPAINTING]), [Shape(64, 64, 1)])
    found = {name: placed.spec.module for name, placed in layout.graphs().items()}
    assert {name: module for name, module in found.items() if "vae_encoder" in name} == modules


@pytest.mark.full
def test_normalized_latents_in_both_tasks(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "checkpoint", tmp_path / "checkpoint/vae/config.json"
    shutil.copytree(checkpoints["sdxl"], checkpoint)
    file.write_text(json.dumps({**json.loads(file.read_text()), **NORMALIZED}))
    how: dict[str, Any] = {"precision": "fp32", "size": SIZE, "tasks": [IMAGE_TO_IMAGE, INPAINTING], "quiet": True}
    how |= {"steps": [2], "batch": 3, **ON}
    build_here(str(checkpoint), tmp_path / "x.bundle", **how)
    first, second = image_graphs.pipelines(checkpoint, "sdxl")
    call = {"prompt": prompts(0, 3), "image": picture(0), "strength": 0.5, "num_inference_steps": 2, "seed": 3}
    masked = {**call, "mask_image": mask(0)}
    with Pipeline.load(tmp_path / "x.bundle") as pipe:
        assert_same(ours(pipe, call), theirs(first, call))
        assert_same(ours(pipe, masked), theirs(second, masked, **SIZES))
