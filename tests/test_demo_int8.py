"""The trained demo model in int8: a person sees the same objects as in fp32, and hardly a difference."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scenes
import score
from here import build_here
from numpy.typing import NDArray
from scenes import Scene
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from turbochain.runtime import Pipeline

FEW = scenes.held_out(2, 2, seed=7)
ALL = scenes.held_out(150, 350)
Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pipeline]]:
    """OpenVINO's in fp32, and in int8."""
    bundle = tmp_path_factory.mktemp("demo") / "int8.bundle"
    shutil.copytree(demo, bundle)
    made = [
        build_here(str(bundle), backend="openvino", options={"inference_precision": "fp32", "int8": int8}, quiet=True)
        for int8 in ("none", "all")
    ]
    assert {made[1].precision[graph] for graph in ("unet", "vae_decoder")} == {"int8"}
    found = [Pipeline.load(bundle, engine=of.engine) for of in made]
    yield found
    for pipe in found:
        pipe.close()


def objects(picture: Picture, scene: Scene) -> list[tuple[str, ...]]:
    """Size and shape of what has the colour of each thing."""
    colours = score.nearest(picture)
    masks = [score.largest(colours == thing.colour) for thing in scene.things]
    return [score.looks_like(mask)[1:] if mask.any() else () for mask in masks]


def compare(pipes: list[Pipeline], asked: list[Scene]) -> None:
    """Draw every scene in both ways."""
    for seed, scene in enumerate(asked):
        exact, int8 = (
            pipe(str(scene), seed=seed, num_inference_steps=1, output_type="uint8").images[0] for pipe in pipes
        )
        assert objects(int8, scene) == objects(exact, scene), scene
        assert bool(score.faults(int8, scene)) == bool(score.faults(exact, scene)), scene
        assert peak_signal_noise_ratio(exact, int8, data_range=255) >= 30, scene
        assert structural_similarity(exact, int8, channel_axis=2, data_range=255) >= 0.9, scene


@pytest.mark.full
def test_few_pictures_show_the_same_objects(pipes: list[Pipeline]) -> None:
    compare(pipes, FEW)


@pytest.mark.full
def test_500_pictures_show_the_same_objects(pipes: list[Pipeline]) -> None:
    compare(pipes, ALL)
