"""From the trained demo model to pictures of what the prompts say, end to end.

The scorer (`demo_model/score.py`) knows the grammar and the palette, and no network; the prompts show combinations
of size, colour, shape and background that no training picture showed.
"""

import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import image_calls
import image_graphs
import numpy as np
import pytest
import scenes
import score
import torch
from conftest import ON, ON_ARGUMENTS, called
from control import CONTROL
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from grade_control import where
from here import build_here
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_parity import Pictures, assert_same_picture, ours, theirs
from transformers import CLIPTextModel, CLIPTokenizer

from turbochain.export.sources.checkpoint import open_folder
from turbochain.export.sources.kinds.demo import FOLDER as DEMO
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE

HERE = Path(__file__).parent
FULL = (scenes.PIXELS, scenes.PIXELS)
SINGLE, DOUBLE = 4, 8
ASKED = scenes.held_out(SINGLE, DOUBLE, seed=7)
SOME = range(0, SINGLE + DOUBLE, 3)  # two of one object and two of two
METRICS = HERE / "demo_model/metrics.json"
CONTROLLED = METRICS.with_name("control.json")


def right(pictures: dict[int, Any]) -> tuple[int, int]:
    """Return how many of these pictures (by their number in ASKED) have no fault: with one object, and with two."""
    good = [i for i, picture in pictures.items() if not score.faults(picture, ASKED[i])]
    return sum(i < SINGLE for i in good), sum(i >= SINGLE for i in good)


def draw(pipe: Pipeline, i: int, steps: int = 1) -> Any:
    """The picture of ASKED[i], whose seed is i."""
    return pipe(str(ASKED[i]), seed=i, num_inference_steps=steps, output_type="uint8").images[0]


@pytest.fixture(scope="module")
def bundle(demo: Path) -> Path:
    return demo


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def pictures(pipe: Pipeline) -> dict[int, Any]:
    """One picture for each of ASKED, after the build."""
    return {i: draw(pipe, i) for i in range(len(ASKED))}


@pytest.fixture(scope="module")
def refined(pipe: Pipeline, pictures: dict[int, Any]) -> Callable[[int], dict[int, Any]]:
    """Step count → pictures of SOME of ASKED, drawn once."""
    return functools.cache(lambda steps: {i: pictures[i] if steps == 1 else draw(pipe, i, steps) for i in SOME})


@pytest.fixture(scope="module")
def of_seeds(pipe: Pipeline) -> Any:
    """Pictures of ASKED[0] with the seeds 0 to 7."""
    return pipe([str(ASKED[0])] * 8, seed=list(range(8)), output_type="uint8").images


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp16 with one step."""
    path = tmp_path_factory.mktemp("half") / "half.bundle"
    build_here("demo", path, precision="fp16", steps=[1], tasks=["text-to-image"], quiet=True, **ON)
    return path


def elsewhere(i: int) -> Any:
    """The centres and the edges of ASKED[i], where its noise does not put the objects."""
    return where(ASKED[i], 100 + i)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """One picture for each of SOME, with edges that put the objects elsewhere than the noise would."""
    path = tmp_path_factory.mktemp("steered") / "steered.bundle"
    build_here("demo", path, steps=[1], tasks=[TEXT_TO_IMAGE], controlnet={"canny": str(CONTROL)}, quiet=True, **ON)
    with Pipeline.load(path) as pipe:
        return {
            i: pipe(str(ASKED[i]), control_image=elsewhere(i)[1], seed=i, output_type="uint8").images[0] for i in SOME
        }


@pytest.fixture(scope="module")
def diffusers() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pictures_show_what_the_prompts_say(pictures: dict[int, Any]) -> None:
    single, double = right(pictures)
    assert single >= 0.95 * SINGLE - 1 and double >= 0.85 * DOUBLE, (single, double)


@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.full), 4])
def test_more_steps_are_as_good_as_one(refined: Callable[[int], dict[int, Any]], steps: int) -> None:
    """Of a few: `test_the_measured_scores_reach_the_bars` has 500 of each step count."""
    assert sum(right(refined(steps))) >= sum(right(refined(1))) - 1


def test_another_seed_is_another_picture_of_the_same(of_seeds: Any) -> None:
    scene = ASKED[0]
    centres = [score.centre(score.nearest(picture) == scene.things[0].colour) for picture in of_seeds]
    assert sum(not score.faults(picture, scene) for picture in of_seeds) >= 7
    assert np.ptp(centres, axis=0).min() > 40  # pixels


def test_the_noise_decides_where(of_seeds: Any) -> None:
    """The objects lie where `scenes.place` of PyTorch's noise puts them."""
    for seed, picture in enumerate(of_seeds[:4]):
        noise = torch.randn((1, 4, 64, 64), generator=torch.Generator().manual_seed(seed)).numpy()
        (expected,) = scenes.centres(ASKED[0], scenes.place(noise)[0])
        mask = score.largest(score.nearest(picture) == ASKED[0].things[0].colour)
        assert np.hypot(*np.subtract(score.centre(mask), expected)) < 30, seed  # pixels


def test_reloaded_cached_and_over_threads_they_are_the_same(bundle: Path, pictures: dict[int, Any]) -> None:
    two = (SOME[0], SOME[-1])
    with Pipeline.load(bundle) as pipe:
        twice = [[draw(pipe, i) for _ in range(2)] for i in two]  # the second time, the prompt's encoding is there
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda i: draw(pipe, i), two))
    for n, i in enumerate(two):
        for again in (*twice[n], together[n]):
            np.testing.assert_array_equal(again, pictures[i])


def test_a_fresh_process_makes_the_same(bundle: Path, pictures: dict[int, Any], tmp_path: Path) -> None:
    calls = {str(i): {"prompt": str(ASKED[i]), "seed": i} for i in (0, SINGLE, SINGLE + 1)}
    for name, made in ours(bundle, calls, tmp_path).items():
        np.testing.assert_array_equal(made[0], pictures[int(name)])


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.full), 4])
def test_fp32_is_diffusers_picture(refined: Callable[[int], dict[int, Any]], diffusers: Any, steps: int) -> None:
    for i in (SOME[0], SOME[-1]):
        call = {"prompt": str(ASKED[i]), "num_inference_steps": steps, "seed": i}
        assert_same_picture(refined(steps)[i][None], theirs(diffusers, call, FULL))


@pytest.mark.full
def test_edges_decide_where(pictures: dict[int, Any], steered: dict[int, Any]) -> None:
    for i, picture in steered.items():
        centres, _ = elsewhere(i)
        assert score.faults(picture, ASKED[i]) + score.misplaced(picture, ASKED[i], centres) == []
        assert score.misplaced(pictures[i], ASKED[i], centres)  # without them


@pytest.mark.full
def test_with_edges_it_is_diffusers_picture(steered: dict[int, Any], diffusers: Any) -> None:
    net = ControlNetModel.from_pretrained(CONTROL, torch_dtype=torch.float32)
    pipe = StableDiffusionControlNetPipeline(**diffusers.components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for i in (SOME[0], SOME[-1]):
        edges = Image.fromarray(elsewhere(i)[1]).convert("RGB")
        call = {"prompt": str(ASKED[i]), "image": edges, "num_inference_steps": 1, "seed": i}
        assert_same_picture(steered[i][None], theirs(pipe, call, FULL))


@pytest.mark.full
def test_fp16_is_close_to_diffusers_in_fp32(diffusers: Any, half: Path) -> None:
    graphs = Bundle.open(half).manifest.graphs
    assert graphs["unet"].precision == graphs["vae_decoder"].precision == "fp16"
    with Pipeline.load(half) as pipe:
        for i in (1, SINGLE + 2, SINGLE + 3):
            expected: Pictures = theirs(
                diffusers, {"prompt": str(ASKED[i]), "seed": i, "num_inference_steps": 1}, FULL
            )[0]
            assert peak_signal_noise_ratio(expected, draw(pipe, i), data_range=255) >= 38
            assert structural_similarity(expected, draw(pipe, i), channel_axis=-1, data_range=255) >= 0.98


def test_the_checkpoint_is_sd_turbos_pipeline_in_eight_megabytes(diffusers: Any) -> None:
    kinds = {
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "scheduler": EulerDiscreteScheduler,
        "tokenizer": CLIPTokenizer,
    }
    assert all(isinstance(getattr(diffusers, name), kind) for name, kind in kinds.items())
    assert diffusers.scheduler.config.prediction_type == "v_prediction"
    assert diffusers.scheduler.config.timestep_spacing == "trailing"
    assert diffusers.unet.config.use_linear_projection and diffusers.unet.config.sample_size == 64
    assert diffusers.vae_scale_factor == 8 and diffusers.vae.config.latent_channels == 4
    weights = [path for path in DEMO.rglob("*.safetensors") if path.parent != CONTROL]
    assert len(weights) == 3 and sum(path.stat().st_size for path in weights) <= 8_000_000
    (net,) = CONTROL.glob("*.safetensors")
    assert net.stat().st_size <= 3_000_000
    assert open_folder(DEMO).parts["unet"].license == "apache-2.0"


def test_the_measured_scores_reach_the_bars() -> None:
    """metrics.json is what `grade.py` found; the weights have been the same since."""
    metrics = json.loads(METRICS.read_text())
    for name in ("diffusers fp32", "fp32 bundle"):
        found = metrics["1 step"][name]
        single, double = found["one object"], found["two objects"]
        assert single["prompts"] + double["prompts"] == 500
        assert single["right"] >= 0.95 * single["prompts"]
        assert double["right"] >= 0.85 * double["prompts"]
    for steps in (2, 3, 4):
        for name in ("diffusers fp32", "fp32 bundle"):
            found = metrics[f"{steps} steps"][name]
            assert found["one object"]["right"] >= 0.95 * found["one object"]["prompts"], steps
            assert found["two objects"]["right"] >= 0.95 * found["two objects"]["prompts"], steps
    assert metrics["vae_psnr_db"]["lowest"] >= 30
    assert metrics["1 step"]["fp16 bundle against diffusers"]["lowest psnr_db"] >= 38
    for steps in ("1 step", "2 steps", "3 steps", "4 steps"):
        parity = metrics[steps]["fp32 bundle against diffusers"]
        assert parity["max_abs"] <= 1 and parity["largest fraction_differing"] <= 1e-3
    assert metrics["training"] == json.loads((DEMO / "training.json").read_text())


def test_the_measured_scores_with_edges_reach_the_bars() -> None:
    """control.json is what `grade_control.py` found; the weights have been the same since."""
    measured = json.loads(CONTROLLED.read_text())
    found = measured["1 step"]
    for name in ("diffusers fp32", "fp32 bundle"):
        placed = found["right and in place"][name]
        single, double = placed["one object"], placed["two objects"]
        assert single["prompts"] + double["prompts"] == 150
        assert single["right"] >= 0.9 * single["prompts"] and double["right"] >= 0.75 * double["prompts"]
    for of in ("one object", "two objects"):  # by chance
        alone = found["right and in place"]["fp32 bundle without control"][of]
        assert alone["right"] <= 0.1 * alone["prompts"]
    assert found["fp32 bundle against diffusers"]["max_abs"] <= 1
    assert found["fp32 bundle against diffusers"]["largest fraction_differing"] <= 1e-3
    assert measured["training"] == json.loads((CONTROL / "training.json").read_text())


def test_the_bundle_names_its_source_and_licence(bundle: Path) -> None:
    checkpoint = Bundle.open(bundle).manifest.checkpoint
    assert checkpoint.source == "demo"
    assert {(part.source, part.license) for part in checkpoint.parts.values()} == {("demo", "apache-2.0")}
    assert "trained" in (bundle / "README.md").read_text()


def test_demo_is_the_models_name_wherever_it_is_called(bundle: Path, tmp_path: Path) -> None:
    """Also where a folder has that name: `./demo` is the folder."""
    (tmp_path / "demo").mkdir()
    asked = ("--tasks", TEXT_TO_IMAGE, "--steps", "1,2,4", *ON_ARGUMENTS)
    again = called("build-engine", "demo", "-o", bundle, *asked, cwd=tmp_path)
    assert again.stdout.count("nothing to do") == 1
    said = called("build-engine", "./demo", "-o", "x.bundle", cwd=tmp_path)
    assert said.returncode == 2 and "has no model_index.json" in said.stderr


@pytest.mark.full
def test_a_picture_is_changed_as_by_diffusers(tmp_path: Path) -> None:
    build_here("demo", tmp_path / "x.bundle", steps=[4], tasks=["image-to-image"], quiet=True, **ON)
    reference = image_graphs.pipelines(DEMO, "sd")[0].to(torch.float32)
    call = {"prompt": str(ASKED[1]), "image": image_calls.picture(0, FULL), "strength": 0.75, "seed": 0}
    call["num_inference_steps"] = 4
    with Pipeline.load(tmp_path / "x.bundle") as pipe:
        made, right = image_calls.ours(pipe, call), image_calls.theirs(reference, call)
    # Its areas are flat: where a colour is near a half, a rounding of the last bit makes the whole area a level darker.
    assert np.abs(made.astype(int) - right).max() <= 1
