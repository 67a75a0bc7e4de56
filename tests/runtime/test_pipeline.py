"""Draw as the arguments say: output types, several prompts, seeds, sizes, and what is warned of."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE
from diffusers import DiffusionPipeline
from launches import PROMPTS, Ran, uint8
from PIL import Image

from turbochain.runtime import InputError, Pipeline, TurbochainError
from turbochain.runtime.commands.bench import bench
from turbochain.runtime.commands.inspect import wires

LONG = "an extraordinarily photorealistic Portrait of Astronauts riding unicorns, " * 9


def test_output_types_are_one_picture(three: Pipeline) -> None:
    seeds = [1, 2]
    levels = uint8(three, PROMPTS[:2], seed=seeds)
    assert levels.dtype == np.uint8
    assert levels.shape == (2, SIZE[1], SIZE[0], 3)
    pictures = three(PROMPTS[:2], seed=seeds).images
    assert [(type(p), p.mode, p.size) for p in pictures] == [(Image.Image, "RGB", SIZE)] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), levels)
    floats = three(PROMPTS[:2], seed=seeds, output_type="np").images
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, levels.astype(np.float32) / np.float32(255))


def test_np_is_within_half_a_level_of_diffusers_floats(one: Pipeline, checkpoints: dict[str, Path]) -> None:
    theirs = DiffusionPipeline.from_pretrained(checkpoints["sd"], local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    options = {
        "guidance_scale": 0.0,
        "num_inference_steps": 1,
        "output_type": "np",
        "height": SIZE[1],
        "width": SIZE[0],
    }
    reference = theirs(PROMPTS[0], generator=generator, **options).images
    result = one(PROMPTS[0], seed=5, **options).images
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    assert np.abs(result - reference).max() <= 0.5 / 255 + 1e-4  # half a level, and the error before rounding


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_many_prompts_equal_single_calls(one: Pipeline, three: Pipeline, batch: int, count: int) -> None:
    pipe = {1: one, 3: three}[batch]
    prompts, seeds = PROMPTS[:count], list(range(10, 10 + count))
    pipe.prompt_cache.clear()
    together = uint8(pipe, prompts, seed=seeds, num_inference_steps=2)
    pipe.prompt_cache.clear()
    alone = [uint8(pipe, p, seed=[s], num_inference_steps=2)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert len(together) == count
    np.testing.assert_array_equal(together, np.stack(alone))


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_truncation_is_warned_of_as_diffusers_does(
    one: Pipeline, three: Pipeline, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = DiffusionPipeline.from_pretrained(checkpoints["sd"], local_files_only=True)
    messages = _Messages()
    logging.getLogger("diffusers").addHandler(messages)
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers"):  # whatever another test has set
            theirs.encode_prompt(LONG, "cpu", 1, False)
    finally:
        logging.getLogger("diffusers").removeHandler(messages)
    (lost,) = (found[1] for text in messages.texts if (found := re.search(r"truncated.*\['(.*)'\]", text)))
    for pipe in (one, three):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="turbochain"):
            uint8(pipe, LONG, seed=0)
        (record,) = (r for r in caplog.records if r.name == "turbochain")  # SDXL's second encoder: not once more
        dropped = record.getMessage().partition("dropped: ")[2]
        assert LONG.endswith(dropped)  # as the user wrote it, capitals and all
        assert "".join(dropped.lower().split()) == "".join(lost.split())


def test_a_prompt_that_fits_is_not_warned_of(one: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="turbochain"):
        uint8(one, "cat " * 75, seed=0)
        assert not caplog.records
        uint8(one, "cat " * 76, seed=0)
        assert len(caplog.records) == 1


def test_no_seed_draws_one_that_can_be_given_again(one: Pipeline) -> None:
    outs = [one("a cat", output_type="uint8") for _ in range(2)]
    assert outs[0].seed != outs[1].seed
    assert not np.array_equal(outs[0].images, outs[1].images)
    for out in outs:
        assert isinstance(out.seed, int) and 0 <= out.seed < 2**64
        np.testing.assert_array_equal(uint8(one, "a cat", seed=out.seed), out.images)


def test_a_seed_may_be_numpys(one: Pipeline) -> None:
    theirs = one("a cat", seed=np.uint64(2**64 - 1), output_type="uint8")
    assert theirs.seed == 2**64 - 1 and type(theirs.seed) is int
    assert np.array_equal(theirs.images, one("a cat", seed=2**64 - 1, output_type="uint8").images)


def test_seed_0_is_a_seed(one: Pipeline) -> None:
    outs = [one("a cat", seed=0, output_type="uint8") for _ in range(2)]
    assert [out.seed for out in outs] == [0, 0]
    np.testing.assert_array_equal(outs[0].images, outs[1].images)
    assert not np.array_equal(outs[0].images, uint8(one, "a cat", seed=1))
    assert one(["a", "b"], seed=[0, 1]).seed == [0, 1]


def test_closed_pipelines_refuse(sd: Path) -> None:
    with Pipeline.load(sd) as pipe:
        assert pipe("a cat", seed=0).images
    with pytest.raises(TurbochainError, match="closed"):
        pipe("a cat", seed=0)
    pipe.close()  # twice is once


def test_the_usual_snippet(one: Pipeline) -> None:
    """stabilityai's model cards, after the pipeline is loaded."""
    pipe = one
    prompt = "A cinematic shot of a baby racoon wearing an intricate italian priest robe."

    image = pipe(prompt=prompt, num_inference_steps=1, guidance_scale=0.0).images[0]

    assert isinstance(image, Image.Image)
    assert image.size == SIZE


@pytest.mark.parametrize("guidance_scale", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_up_to_1_is_none(one: Pipeline, guidance_scale: float) -> None:
    result = uint8(one, "a cat", seed=1, guidance_scale=guidance_scale)
    np.testing.assert_array_equal(result, uint8(one, "a cat", seed=1))


def test_height_and_width_may_be_the_bundles(one: Pipeline) -> None:
    expected = uint8(one, "a cat", seed=1)
    for size in ({"height": SIZE[1]}, {"width": SIZE[0]}, {"height": SIZE[1], "width": SIZE[0]}):
        np.testing.assert_array_equal(uint8(one, "a cat", seed=1, **size), expected)
    for size in ({"height": 128}, {"width": 512}, {"height": 128, "width": SIZE[0]}):
        with pytest.raises(InputError, match=f"built for {SIZE[1]}x{SIZE[0]}"):
            uint8(one, "a cat", seed=1, **size)


def test_steps_default_to_the_fewest(one: Pipeline, ran: Ran) -> None:
    first = uint8(one, "a cat", seed=1, observe=ran)
    np.testing.assert_array_equal(first, uint8(one, "a cat", seed=1, num_inference_steps=1, observe=ran))
    assert ran["unet"] == 2


def test_an_image_of_another_size_is_said(one: Pipeline) -> None:
    """The output has the size that the image had, if it is not the one that was drawn."""
    for size, expected in ((SIZE, None), ((100, 60), (60, 100)), ((64, 72), (72, 64))):
        image = Image.effect_noise(size, 90).convert("RGB")
        call: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 2, "seed": 1, "output_type": "uint8"}
        found = one("a cat", image=image, **call)
        assert found.resized == expected
        same = one("a cat", image=image.resize(SIZE, Image.Resampling.LANCZOS), **call)
        assert same.resized is None
        np.testing.assert_array_equal(found.images, same.images)
    assert one("a cat", seed=1).resized is None


def test_the_bench_times_what_runs_for_a_picture(sd: Path) -> None:
    result = bench(sd, runs=2, warmup=0, steps=3)
    assert {name: timing.n for name, timing in result.stages.items()} == {
        "text_encoder": 2,
        "unet": 12,
        "step": 12,
        "vae_decoder": 4,
    }
    assert (result.evaluations, result.strength, result.guidance_scale) == (3, None, 0.0)


def test_the_wiring_tells_when(one: Pipeline) -> None:
    found = [(w["name"], w["from"], w["to"]) for w in wires(one.bundle.open_chain())]
    assert found[0] == ("input_ids", "caller", "text_encoder")
    for wire in (
        ("time_projections", "table, each step", "unet"),
        ("noise", "caller, each step", "step"),
        ("prediction", "unet", "step"),
        ("noise", "caller, each step", "step+guidance"),
        ("guidance_scale", "caller", "step+guidance"),
        ("negative_prompt_embeds", "text_encoder", "unet"),
        ("next_latents", "step or step+guidance", "latents of the next step"),
        ("image", "vae_decoder", "caller"),
    ):
        assert wire in found, wire
    found = [(w["name"], w["from"], w["to"]) for w in wires(one.bundle.open_chain("image-to-image"))]
    assert {("p", "table", "start"), ("image_latents", "vae_encoder", "start"), ("latents", "start", "unet")} <= {
        *found
    }


def test_warmup_runs_everything_and_changes_nothing(sd: Path, one: Pipeline) -> None:
    ran = Ran()
    with Pipeline.load(sd) as pipe:
        pipe.warmup(3)
        np.testing.assert_array_equal(uint8(pipe, "a cat", seed=1), uint8(one, "a cat", seed=1))
        uint8(pipe, "", seed=1, observe=ran)
        assert ran == {"unet": 1, "step": 1, "vae_decoder": 1}  # so the text encoder has run, on the empty prompt
