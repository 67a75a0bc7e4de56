"""Guidance, negative prompts, clip_skip, many steps and LCMs: pictures against diffusers' own pipelines."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import ON, SIZE, BundleFactory
from diffusers import DiffusionPipeline
from here import build_here
from PIL import Image
from safetensors.numpy import load_file, save_file

from turbochain.export.sources import synthetic
from turbochain.runtime import InputError, Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


PROMPT, NEGATIVE = "a photo of a cat wearing a red hat", "blurry, low quality"
THREE = ["a lighthouse at dusk", "", "une petite maison bleue"]
Call = dict[str, Any]
Shares = list[float]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def diffused(pipe: Any, call: Call, seed: int) -> np.ndarray:
    """What diffusers makes of a call of ours."""
    arguments = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in call.items()}
    size = {} if "image" in call and "mask_image" not in call else {"height": SIZE[1], "width": SIZE[0]}
    return np.stack([np.asarray(i) for i in pipe(**arguments, **size, generator=seeded(seed)).images])


def shares(ours: Pipeline, theirs: Any, call: Call, seed: int = 0) -> Shares:
    """Return for each picture the share of its values that differ, after checking that it is at most 0.1%, by 1."""
    mine = ours(**call, seed=seed, output_type="uint8").images
    assert isinstance(mine, np.ndarray)
    reference = diffused(theirs, call, seed)
    assert mine.dtype == reference.dtype == np.uint8 and mine.shape == reference.shape
    apart = np.abs(mine.astype(int) - reference)
    found = [float((one > 0).mean()) for one in apart]
    assert apart.max() <= 1 and max(found) <= 1e-3, (call, seed, apart.max(), found)
    return found


def loaded(checkpoint: Path, scheduler: dict[str, Any] | None = None, task: str | None = None) -> Any:
    """diffusers' own pipeline in fp32."""
    pipe: Any = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, local_files_only=True)
    if scheduler:
        changes = {name: value for name, value in scheduler.items() if name != "_class_name"}
        pipe.scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(pipe.scheduler.config, **changes)
    if task:
        pipe = getattr(diffusers, task).from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(family: str, checkpoints: dict[str, Path]) -> Any:
    return loaded(checkpoints[family])


@pytest.fixture(scope="module")
def ours(family: str, bundle_of: BundleFactory) -> Iterator[Pipeline]:
    with Pipeline.load(bundle_of(family)) as pipe:
        yield pipe


CALLS: dict[str, Call] = {
    "1.0": {"guidance_scale": 1.0},
    "1.5, None": {"guidance_scale": 1.5},
    "7.5, empty": {"guidance_scale": 7.5, "negative_prompt": ""},
    "12, text": {"guidance_scale": 12.0, "negative_prompt": NEGATIVE},
    "whole numbers": {"guidance_scale": 7, "negative_prompt": NEGATIVE},
    "a list": {"guidance_scale": 7.5, "prompt": THREE, "negative_prompt": ["dark", "", NEGATIVE]},
    "several pictures": {"guidance_scale": 7.5, "negative_prompt": NEGATIVE, "num_images_per_prompt": 2},
}


@pytest.mark.parametrize("case", CALLS)
def test_guidance(ours: Pipeline, theirs: Any, case: str) -> None:
    shares(ours, theirs, {"prompt": PROMPT, "num_inference_steps": 2, **CALLS[case]})


def test_no_negative_prompt_is_zeros_for_sdxl_alone(family: str, ours: Pipeline) -> None:
    call: Call = {"guidance_scale": 7.5, "num_inference_steps": 1, "seed": 1, "output_type": "uint8"}
    without, empty = (ours(PROMPT, **call, **more).images for more in ({}, {"negative_prompt": ""}))
    assert np.array_equal(without, empty) == (family == "sd")


def embeds(theirs: Any, family: str, prompts: list[str]) -> Call:
    """What diffusers' text encoders make of prompts and of a negative one."""
    given: Call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.inference_mode():
        made = theirs.encode_prompt(prompt=prompts, negative_prompt=[NEGATIVE] * len(prompts), **given)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    return {name: value.numpy() for name, value in zip(names, made[: 4 if family == "sdxl" else 2], strict=False)}


def test_embeds_of_both_prompts(family: str, ours: Pipeline, theirs: Any) -> None:
    """They replace the text encoders, and give the picture of the texts."""
    given = embeds(theirs, family, [PROMPT, "a dog"])
    call: Call = {"guidance_scale": 7.5, "num_inference_steps": 2}
    for repeats in (1, 2):
        shares(ours, theirs, {**given, **call, "num_images_per_prompt": repeats})
    ours.forget()
    graphs: list[str] = []
    made = ours(**given, **call, seed=3, output_type="uint8", observe=lambda graph, _: graphs.append(graph)).images
    assert not [graph for graph in graphs if graph.startswith("text")]
    texts = ours([PROMPT, "a dog"], **call, negative_prompt=NEGATIVE, seed=3, output_type="uint8").images
    assert np.abs(np.asarray(made, int) - np.asarray(texts, int)).max() <= 1


def test_embeds_that_do_not_fit(family: str, ours: Pipeline, theirs: Any) -> None:
    given = embeds(theirs, family, [PROMPT])
    negative = {name: value for name, value in given.items() if name.startswith("negative")}
    for call, message in (
        (
            {"prompt": PROMPT, "negative_prompt": "a", **negative},
            "negative_prompt and negative_prompt_embeds were given",
        ),
        ({"prompt": [PROMPT, "a"], **negative}, "negative_prompt_embeds are of 1: one for each of 2 prompts"),
        (
            {"prompt": PROMPT, **negative, "negative_prompt_embeds": negative["negative_prompt_embeds"][:, :5]},
            r"negative_prompt_embeds is float32 \[1, 5, \d+\]",
        ),
        ({"prompt": PROMPT, "guidance_rescale": 0.7}, "guidance_rescale was given"),
    ):
        with pytest.raises(InputError, match=message):
            ours(**call, guidance_scale=7.5)


def copied(checkpoint: Path, folder: Path, changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> Path:
    """Write a checkpoint with the same weights, whose JSON files are changed."""
    shutil.copytree(checkpoint, folder, copy_function=os.link)
    for name, change in changes.items():
        made = change(json.loads((folder / name).read_text()))
        (folder / name).unlink()  # a link to the shared file
        (folder / name).write_text(json.dumps(made))
    return folder


def test_ten_steps_of_pndm_with_guidance(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """All graphs but the sampler's are those of the shared bundle."""
    change = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
    of_index = {"scheduler": ["diffusers", "PNDMScheduler"]}
    checkpoint = copied(
        checkpoints["sd"],
        tmp_path / "checkpoint",
        {
            "model_index.json": lambda index: index | of_index,
            "scheduler/scheduler_config.json": lambda config: config | change,
        },
    )
    wanted: Call = {"precision": "fp32", "size": SIZE, "steps": [10], "tasks": ["text-to-image"], "quiet": True}
    build_here(str(checkpoint), tmp_path / "b", guidance_scale=7.5, **wanted, **ON)
    with Pipeline.load(tmp_path / "b") as pipe:
        call: Call = {"prompt": PROMPT, "num_inference_steps": 10}
        shares(pipe, loaded(checkpoint), {**call, "guidance_scale": 7.5, "negative_prompt": NEGATIVE})
        given, default = (pipe(**call, **g, seed=1, output_type="uint8").images for g in ({"guidance_scale": 7.5}, {}))
        assert np.array_equal(given, default)


def as_lcm(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint as an LCM: its UNet gets one more matrix, which its time embedding reads the scale with.

    The graph of the UNet stays the same, because what depends on the timestep alone is in the tables.
    """
    scheduler = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
    of_index = {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    copied(
        checkpoint,
        folder,
        {
            "model_index.json": lambda index: index | of_index,
            "unet/config.json": lambda config: config | {"time_cond_proj_dim": 16},
            "scheduler/scheduler_config.json": lambda config: config | scheduler,
        },
    )
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    inner = weights["time_embedding.linear_1.weight"].shape[1]
    more = np.random.default_rng(0).normal(0, 0.3, (inner, 16)).astype(np.float32)
    file.unlink()
    save_file({**weights, "time_embedding.cond_proj.weight": more}, file, metadata={"format": "pt"})
    return folder


IMAGE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), np.uint8)).resize(SIZE)


def test_an_lcm(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = as_lcm(checkpoints["sd"], tmp_path / "checkpoint")
    wanted: Call = {"precision": "fp32", "size": SIZE, "steps": [1, 4], "guidance_scales": [8.5, 1.0], "quiet": True}
    build_here(str(checkpoint), tmp_path / "b", strengths=[0.8, 0.5], **wanted, **ON)
    theirs = loaded(checkpoint)
    of_image = loaded(checkpoint, task="LatentConsistencyModelImg2ImgPipeline")
    with Pipeline.load(tmp_path / "b") as pipe:
        for steps, scale in ((1, 8.5), (4, 1.0), (4, 8.5)):
            shares(pipe, theirs, {"prompt": PROMPT, "num_inference_steps": steps, "guidance_scale": scale})
        for strength in (0.8, 0.5):
            call: Call = {"prompt": PROMPT, "image": IMAGE, "strength": strength, "num_inference_steps": 4}
            shares(pipe, of_image, {**call, "guidance_scale": 8.5})
        with pytest.raises(InputError, match=r"guidance_scale=7.5: .* are made for 1.0, 8.5; .*--guidance-scales"):
            pipe(PROMPT, guidance_scale=7.5)
        with pytest.raises(InputError, match=r"strength=0.6: .* are made for 0.5, 0.8; .*--strengths"):
            pipe(PROMPT, image=IMAGE, strength=0.6)


SOLVERS: dict[str, dict[str, Any]] = {
    "DDIM": {"_class_name": "DDIMScheduler", "clip_sample": False},  # as SD 1.5's own config has it
    "DPM++ 2M": {"_class_name": "DPMSolverMultistepScheduler"},
    "Euler a": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "PNDM": {"_class_name": "PNDMScheduler"},
    "UniPC": {"_class_name": "UniPCMultistepScheduler"},
}
OF_IMAGE = {
    "sd15-mini": "StableDiffusionImg2ImgPipeline",
    "sdxl-mini": "StableDiffusionXLImg2ImgPipeline",
    "lcm-sd15-mini": "LatentConsistencyModelImg2ImgPipeline",
    "lcm-sdxl-mini": "StableDiffusionXLImg2ImgPipeline",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset → its checkpoint, written once."""
    root = tmp_path_factory.mktemp("presets")

    def write(name: str) -> Path:
        if not (root / name).exists():
            synthetic.write_checkpoint(name, root / name)
        return root / name

    return write


@pytest.mark.full
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("preset", ["sd15-mini", "sdxl-mini"])
def test_every_solver_with_guidance(preset: str, solver: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    """20 steps: ten seeds at 7.5 with the negative prompts by turns, three at other scales and three with an image."""
    wanted: Call = {"precision": "fp32", "size": SIZE, "steps": [20], "scheduler": SOLVERS[solver], "quiet": True}
    build_here(str(written(preset)), tmp_path / "b", **wanted, **ON)
    theirs = loaded(written(preset), SOLVERS[solver])
    of_image = loaded(written(preset), SOLVERS[solver], OF_IMAGE[preset])
    negatives: list[Call] = [{}, {"negative_prompt": ""}, {"negative_prompt": NEGATIVE}]
    call: Call = {"prompt": PROMPT, "num_inference_steps": 20}
    with Pipeline.load(tmp_path / "b") as pipe:
        ten = [shares(pipe, theirs, {**call, "guidance_scale": 7.5, **negatives[s % 3]}, s)[0] for s in range(10)]
        assert np.mean(ten) <= 5e-4
        others = [
            shares(pipe, theirs, {**call, "guidance_scale": scale, **negatives[s]}, s)[0]
            for scale in (1.0, 1.5, 12.0)
            for s in range(3)
        ]
        images = [
            shares(pipe, of_image, {**call, "image": IMAGE, "strength": 0.6, "guidance_scale": 7.5, **negatives[s]}, s)[
                0
            ]
            for s in range(3)
        ]
    print(f"{preset} {solver}: pooled {np.mean(ten):.6f}, worst {max(ten):.6f}, {max(others):.6f}, {max(images):.6f}")


@pytest.mark.full
@pytest.mark.parametrize("preset", ["lcm-sd15-mini", "lcm-sdxl-mini"])
def test_lcm_presets(preset: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    """The default guidance is the pipeline's own; ten seeds of each step count."""
    wanted: Call = {"precision": "fp32", "size": SIZE, "steps": [1, 2, 4, 8], "quiet": True}
    build_here(str(written(preset)), tmp_path / "b", **wanted, **ON)
    theirs, of_image = loaded(written(preset)), loaded(written(preset), task=OF_IMAGE[preset])
    with Pipeline.load(tmp_path / "b") as pipe:
        for steps in (1, 2, 4, 8):
            call: Call = {"prompt": PROMPT, "num_inference_steps": steps}
            ten = [shares(pipe, theirs, call, seed)[0] for seed in range(10)]
            strong = {**call, "image": IMAGE, "strength": 1.0 if steps == 1 and "xl" in preset else 0.8}
            images = [shares(pipe, of_image, strong, seed)[0] for seed in range(10)]
            assert max(np.mean(ten), np.mean(images)) <= 5e-4
            print(f"{preset} {steps}: {np.mean(ten):.6f} {max(ten):.6f}, image {np.mean(images):.6f} {max(images):.6f}")


@pytest.mark.full
@pytest.mark.parametrize("preset", ["sd15-mini", "sdxl-mini"])
def test_clip_skip(preset: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    wanted: Call = {"precision": "fp32", "size": SIZE, "steps": [4], "tasks": ["text-to-image"], "batch": 3}
    build_here(str(written(preset)), tmp_path / "b", clip_skip=1, quiet=True, **wanted, **ON)
    theirs = loaded(written(preset))
    if preset == "sd15-mini":  # diffusers looks for the final norm there, and transformers 5 has it in the encoder
        vars(theirs.text_encoder)["text_model"] = theirs.text_encoder
    with Pipeline.load(tmp_path / "b") as pipe:
        for scale in (1.0, 7.5):
            call: Call = {"prompt": THREE, "guidance_scale": scale, "num_inference_steps": 4, "clip_skip": 1}
            shares(pipe, theirs, {**call, "negative_prompt": [NEGATIVE] * 3})
            given, left_out = (
                pipe(**c, seed=1, output_type="uint8").images for c in (call, {**call, "clip_skip": None})
            )
            assert np.array_equal(given, left_out)
        for other in (0, 2):
            with pytest.raises(InputError, match=r"clip_skip was given: .*--clip-skip"):
                pipe(PROMPT, clip_skip=other)
    with pytest.raises(InputError, match="clip_skip 9: the text encoders have layers for 0 to"):
        build_here(str(written(preset)), tmp_path / "c", clip_skip=9, quiet=True, **wanted, **ON)
