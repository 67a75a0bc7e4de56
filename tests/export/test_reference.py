"""The recorded reference is complete, and diffusers makes the same again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BATCH, FAMILIES, ROOT, SIZE, BundleFactory, in_each_precision
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from turbochain.export.packing import Packer
from turbochain.export.sources.checkpoint import open_folder
from turbochain.runtime import Bundle
from turbochain.runtime.checks import reference as checks

TIME = {"sd": "time_projections", "sdxl": "time_embeds"}  # the column that depends on the timestep


@pytest.fixture
def bundle(bundle_of: BundleFactory, family: str, precision: str = "fp32") -> Bundle:
    return Bundle.open(bundle_of(family, precision))


def reference(bundle: Bundle) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    path = bundle.path / "reference.safetensors"
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["cases"]), load_file(path)


EMBEDS = {"sd": ("prompt_embeds",), "sdxl": ("prompt_embeds", "prompt_embeds_2", "pooled_prompt_embeds")}

IDS = {"sd": ("input_ids",), "sdxl": ("input_ids", "input_ids_2")}

PER_STEP = ("latents", "prediction")  # and the noise, in a call whose steps draw

OF_GUIDANCE = ("negative_prediction",)  # in every step

OF_IMAGE = ("input_image", "posterior_noise", "image_latents", "start_noise")

CASES = [
    *(("text-to-image", steps, steps, False) for steps in (1, 2, 3, 4)),
    ("text-to-image", 1, 1, True),
    ("image-to-image", 4, 3, False),
    ("image-to-image", 2, 1, True),
]

"""Chain, num_inference_steps, the steps that are made, and whether guidance is on."""


def recorded(family: str, chain: str, guided: bool, drawn: bool) -> tuple[set[str], set[str]]:
    """The names of what a case has once, and of what it has in every step; `drawn`: whether a step draws."""
    once, steps = {*EMBEDS[family], *IDS[family], "image"}, {*PER_STEP, *(["noise"] if drawn else [])}
    if guided:
        # SDXL's config says that no negative prompt is zeros; SD's text encoder reads "".
        once |= {f"negative_{name}" for name in (*EMBEDS[family], *(IDS[family] if family == "sd" else ()))}
        once, steps = once | {"guidance_scale"}, {*steps, *OF_GUIDANCE}
    return once | {*(OF_IMAGE if chain == "image-to-image" else ())}, steps


@pytest.mark.parametrize(("family", "precision"), in_each_precision((family,) for family in FAMILIES))
def test_reference_has_what_its_docstring_says(bundle_of: BundleFactory, family: str, precision: str) -> None:
    bundle = Bundle.open(bundle_of(family, precision))
    cases, tensors = reference(bundle)
    found = [(case["chain"], case["num_inference_steps"], case["modes"]) for case in cases]
    assert found == [(chain, steps, ["guidance"] * guided) for chain, steps, _, guided in CASES]
    known = set()
    for i, (case, (name, _, made, guided)) in enumerate(zip(cases, CASES, strict=True)):
        chain, table = bundle.open_chain(name), bundle.open_chain(name).tables[case["table"]]
        # Euler ancestral draws in each step, also in the last one, which multiplies it by 0; SD's Euler never does.
        once, per_step = recorded(family, name, guided, drawn=family == "sdxl")
        assert len(case["prompt"]) == chain.batch == BATCH[family, precision]
        assert table.rows == made
        left, places = tensors[f"{i}/next_latents"], tensors[f"{i}/{TIME[family]}"]
        assert left.shape == (1, *chain.tensors["latents"].shape) and left.dtype == np.float32
        assert places.shape == (made, 1) and places.dtype == np.int32
        known |= {f"{i}/next_latents", f"{i}/{TIME[family]}"}
        for name in once | per_step:
            value, wanted = tensors[f"{i}/{name}"], chain.tensors[name]
            assert value.shape == (*([made] if name in per_step else []), *wanted.shape), name
            assert value.dtype == wanted.dtype, name
            known.add(f"{i}/{name}")
    distinct = tensors[f"columns/{TIME[family]}"]
    assert len(np.unique(distinct, axis=0)) == len(distinct)
    others = {name for name in tensors if not name.startswith("magnitude/")} - {f"columns/{TIME[family]}"}
    assert others == known


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_what_diffusers_does(bundle: Bundle, checkpoints: dict[str, Path], family: str) -> None:
    """A pipeline of the test's own, watched by hooks of the test's own."""
    cases, tensors = reference(bundle)
    whole = [case for chain in bundle.manifest.chains for case in checks.read(bundle, chain).cases]
    pipe = DiffusionPipeline.from_pretrained(checkpoints[family], local_files_only=True)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    for of in (pipe, other):
        of.set_progress_bar_config(disable=True)
    watched = {
        "vae/encoder.conv_in": pipe.vae.encoder.conv_in,
        "unet/mid_block": pipe.unet.mid_block,
        "unet/conv_in": pipe.unet.conv_in,
        "vae/decoder.up_blocks.0": pipe.vae.decoder.up_blocks[0],
    }
    largest = dict.fromkeys(watched, 0.0)
    for key, module in watched.items():

        def see(_: Any, __: Any, output: torch.Tensor, key: str = key) -> None:
            largest[key] = max(largest[key], float(output.abs().max()))

        module.register_forward_hook(see)
    for i, case in enumerate(cases):
        generator, made = torch.Generator("cpu").manual_seed(case["seed"]), whole[i].tensors
        arguments = {k: case[k] for k in ("prompt", "num_inference_steps", "guidance_scale")}
        assert (case["guidance_scale"] > 1) == bool(case["modes"])
        if case["chain"] == "image-to-image":
            pictures = [Image.fromarray(picture) for picture in tensors[f"{i}/input_image"]]
            arguments |= {"image": pictures, "strength": case["strength"]}
            images = other(**arguments, generator=generator).images
        else:
            images = pipe(**arguments, generator=generator, height=SIZE[1], width=SIZE[0]).images
        difference = np.abs(tensors[f"{i}/image"].astype(int) - np.stack([np.asarray(image) for image in images]))
        assert difference.max() <= 1  # the text encoder's attention is fused here, and may be eager there
        assert (difference > 0).mean() <= 1e-3

        generator.manual_seed(case["seed"])
        start = torch.randn(len(case["prompt"]), 4, SIZE[1] // 8, SIZE[0] // 8, generator=generator)
        pipe.scheduler.set_timesteps(case["num_inference_steps"])
        latents, following = made["latents"], made["next_latents"]
        if case["chain"] == "image-to-image":
            np.testing.assert_array_equal(tensors[f"{i}/posterior_noise"], start.numpy())
            clean, noise = (torch.from_numpy(tensors[f"{i}/{name}"]) for name in ("image_latents", "start_noise"))
            first = pipe.scheduler.timesteps[-len(latents)].repeat(len(clean))
            np.testing.assert_array_equal(latents[0], pipe.scheduler.add_noise(clean, noise, first).numpy())
        else:
            np.testing.assert_array_equal(latents[0], (start * pipe.scheduler.init_noise_sigma).numpy())
        np.testing.assert_array_equal(latents[1:], following[:-1])
        np.testing.assert_array_equal(following[-1:], tensors[f"{i}/next_latents"])
    for key, value in largest.items():
        np.testing.assert_allclose(tensors[f"magnitude/{key}"], [value], rtol=1e-4)


@pytest.mark.parametrize(("i", "name"), [(1, "next_latents"), (2, "guided_prediction")])
def test_a_call_that_its_reference_would_not_tell_is_an_error(i: int, name: str) -> None:
    """Only what follows from the rest is left out: of a run of three rows, and of a call with guidance."""
    bundle = Bundle.open(ROOT / "tests/golden/bundle")
    chain, case = bundle.manifest.chains["text-to-image"], checks.read(bundle, "text-to-image").cases[i]
    found = case.tensors
    kept = Packer().pack(found, chain, case.table)
    assert kept.keys() == {*found} - {"guided_prediction"} and len(kept["next_latents"]) == 1
    with pytest.raises(RuntimeError, match=f"differs from what its reference would say: {name}$"):
        Packer().pack({**found, name: found[name] + np.float32(1e-3)}, chain, case.table)


def test_an_excerpt_is_kept_and_read_as_it_was() -> None:
    """Two rows of three, and what the last one left."""
    bundle = Bundle.open(ROOT / "tests/golden/bundle")
    chain, case = bundle.manifest.chains["text-to-image"], checks.read(bundle, "text-to-image").cases[1]
    found = case.tensors
    of_loop = ("latents", "prediction", "noise")
    excerpt = {**found, **{name: found[name][:2] for name in of_loop}}
    assert [len(found[name]) for name in of_loop] == [3] * 3
    packer = Packer()
    kept = packer.pack(excerpt, chain, case.table)
    np.testing.assert_array_equal(kept["next_latents"], found["next_latents"][1:])
    columns = {name.removeprefix("columns/"): value for name, value in packer.columns().items()}
    again = checks.whole(kept, columns, chain, case.table)
    assert again.keys() == excerpt.keys()
    assert all(np.array_equal(again[name], value) for name, value in excerpt.items())


def test_a_reference_may_keep_every_row_of_what_is_carried() -> None:
    """As bundles do that were built before it was left out."""
    bundle = Bundle.open(ROOT / "tests/golden/bundle")
    chain, case = bundle.manifest.chains["text-to-image"], checks.read(bundle, "text-to-image").cases[1]
    assert len(case.tensors["next_latents"]) == 3
    again = checks.whole(case.tensors, {}, chain, case.table)
    np.testing.assert_array_equal(again["next_latents"], case.tensors["next_latents"])


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_cover_every_component(bundle: Bundle, checkpoints: dict[str, Path], family: str) -> None:
    _, tensors = reference(bundle)
    magnitudes = {k.removeprefix("magnitude/"): v for k, v in tensors.items() if k.startswith("magnitude/")}
    assert {name.partition("/")[0] for name in magnitudes} == {*open_folder(checkpoints[family]).family.components}
    assert all(v.shape == (1,) and np.isfinite(v).all() and v > 0 for v in magnitudes.values())
    (weights,) = (checkpoints[family] / "unet").glob("*.safetensors")
    modules = {name.rpartition(".")[0] for name in load_file(weights)}
    assert {f"unet/{module}" for module in modules} <= set(magnitudes)
