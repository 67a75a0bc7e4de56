"""The demo model's prompts, pictures and scorer: what the scores of `test_demo.py` rest on."""

import dataclasses
import itertools
from pathlib import Path

import architecture
import numpy as np
import pytest
import scenes
import score
import torch
from diffusers import AutoencoderKL
from scenes import Scene, Thing
from transformers import CLIPTokenizer

from turbochain.export.sources.kinds.demo import FOLDER
from turbochain.export.sources.vocabulary import write_tokenizer

PAIR = Scene((Thing("", "red", "circle"), Thing("large", "blue", "star")), "left of", "yellow")
HERE = np.zeros(2, np.float32)


def combinations(scene: Scene) -> set[tuple[Thing, str]]:
    return {(thing, scene.background) for thing in scene.things}


def test_no_training_picture_shows_a_held_out_combination() -> None:
    random = np.random.default_rng(0)
    trained = set().union(*(combinations(scenes.training_scene(random)) for _ in range(20_000)))
    asked = scenes.held_out(150, 350)
    assert len({str(scene) for scene in asked}) == 500
    assert [bool(scene.relation) for scene in asked] == [False] * 150 + [True] * 350
    assert all(combinations(scene) - trained for scene in asked)
    single = set().union(*(combinations(scene) for scene in scenes.alone()))
    assert len(single) == 3 * 8 * 4 * 7 and len(trained) == len(single) - sum(s.held_out for s in scenes.alone())


def test_the_prompt_is_english() -> None:
    assert str(PAIR) == "a red circle left of a large blue star on a yellow background"
    orange = Scene((Thing("", "orange", "square"),), "", "orange")
    assert str(orange) == "an orange square on an orange background"


def test_every_word_is_one_token_as_in_clip(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "clip", pad_token="!")
    architecture.write_tokenizer(tmp_path / "ours")
    ours, clip = (CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "clip"))
    prompts = [str(scene) for scene in scenes.held_out(100, 100)]
    assert {word for prompt in prompts for word in prompt.split()} == set(architecture.words())
    for prompt in prompts:
        assert ours.tokenize(prompt) == clip.tokenize(prompt) == [f"{word}</w>" for word in prompt.split()]
    assert "".join(ours.tokenize("Grüße, 猫")) == "".join(clip.tokenize("Grüße, 猫"))
    assert len(ours) < 700 < len(clip)


def test_the_noise_places_the_objects() -> None:
    """PyTorch's noise, of whichever size, gives two independent standard normal numbers."""
    for side in (32, 64):
        noise = torch.randn((2000, 4, side, side), generator=torch.Generator().manual_seed(0)).numpy()
        placed = scenes.place(noise)
        np.testing.assert_allclose(np.cov(placed.T), np.eye(2), atol=0.12)
        white = noise[0, :2, ::2, ::2] + noise[0, :2, 1::2, 1::2]
        black = noise[0, :2, ::2, 1::2] + noise[0, :2, 1::2, ::2]
        np.testing.assert_allclose(placed[0], (white - black).sum((1, 2)) / side, rtol=1e-3)


def test_a_picture_hides_nothing_of_the_place() -> None:
    """What the noise says of it is still there in a picture that is half drawn: the picture adds next to nothing."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)
    random = np.random.default_rng(0)
    drawn = np.stack([scenes.draw(scene, random.standard_normal(2)) for scene in scenes.held_out(4, 4)])
    with torch.inference_mode():
        given = torch.from_numpy(drawn.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        latents = vae.encode(given).latent_dist.mean.numpy() * vae.config.scaling_factor
    assert np.abs(latents.mean((2, 3))[:, :2]).max() * 64 > 10  # a plain mean would drown
    assert np.abs(scenes.place(latents)).max() < 0.1


@pytest.mark.parametrize("extreme", list(itertools.product((-4, 4), repeat=2)))
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_large_objects_neither_touch_nor_leave(shape: str, extreme: tuple[int, ...]) -> None:
    placed = np.float32(extreme)
    for relation in scenes.RELATIONS:
        scene = Scene((Thing("large", "red", shape), Thing("large", "blue", shape)), relation, "white")
        masks = [
            scenes.coverage(shape, scenes.DIAMETERS["large"], at, 2 * scenes.PIXELS) > 0
            for at in ((x + 256, y + 256) for x, y in scenes.centres(scene, placed))
        ]
        assert not (masks[0] & masks[1]).any()
        inside = np.s_[256:-256, 256:-256]
        assert all(mask[inside].sum() == mask.sum() for mask in masks)


def test_shapes_have_the_areas_of_geometry() -> None:
    """With the polygons' own formulas: circumscribed ones of apothem a, and the pentagram."""
    d = 176.0
    a, s = 0.32 * d, 0.18 * d
    golden = (1 + 5**0.5) / 2
    tip, notch = s / np.cos(np.radians(72)), s / np.cos(np.radians(72)) / golden**2
    expected = {
        "circle": np.pi * d**2 / 4,
        "square": (0.88 * d) ** 2,
        "triangle": 3 * 3**0.5 * a**2,
        "star": 5 * tip * notch * np.sin(np.radians(36)),
    }
    for shape, area in expected.items():
        assert scenes.coverage(shape, d, (250.3, 261.8)).sum() == pytest.approx(area, rel=2e-3), shape


def test_what_is_drawn_has_no_fault() -> None:
    random = np.random.default_rng(1)
    for scene in scenes.held_out(10, 15):
        assert score.faults(scenes.draw(scene, random.standard_normal(2)), scene) == []


def changed(**changes: str) -> Scene:
    """PAIR, with its star changed."""
    return dataclasses.replace(PAIR, things=(PAIR.things[0], dataclasses.replace(PAIR.things[1], **changes)))


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (changed(colour="green"), "nothing is blue"),
        (changed(shape="triangle"), "a large blue star is a"),
        (changed(size="small"), "a large blue star is a small star"),
        (dataclasses.replace(PAIR, relation="right of"), "a red circle is not left of a large blue star"),
        (dataclasses.replace(PAIR, relation="above"), "is not left of"),
        (dataclasses.replace(PAIR, background="white"), "of the picture is neither an object nor yellow"),
        (dataclasses.replace(PAIR, things=PAIR.things[:1], relation=""), "nothing is blue"),
    ],
    ids=["colour", "shape", "size", "relation", "direction", "background", "missing"],
)
def test_a_wrong_picture_is_told(drawn: Scene, said: str) -> None:
    found = score.faults(scenes.draw(drawn, HERE), PAIR)
    assert found and said in "; ".join(found), found


def test_a_third_object_and_a_blot_are_told() -> None:
    picture = scenes.draw(PAIR, HERE)
    third = scenes.coverage("circle", 176, (256, 90)) > 0.5
    picture[third] = scenes.COLOURS["black"]
    assert any("9% of the picture is neither" in fault for fault in score.faults(picture, PAIR))
    picture = scenes.draw(PAIR, HERE)
    picture[150:190, 330:420] = scenes.COLOURS["blue"]
    assert any("a large blue star" in fault for fault in score.faults(picture, PAIR))


def test_an_object_that_lies_elsewhere_is_told() -> None:
    picture, (first, (x, y)) = scenes.draw(PAIR, HERE), scenes.centres(PAIR, HERE)
    assert score.misplaced(picture, PAIR, [first, (x, y)]) == []
    assert score.misplaced(picture, PAIR, [first, (x + 10, y)]) == []
    assert score.misplaced(picture, PAIR, [first, (x - 12, y + 16)]) == ["a large blue star is 20 pixels away"]


def test_the_controlnet_begins_with_a_channel_for_each_pixel_of_a_latent() -> None:
    reads = architecture.controlnet(architecture.unet()).controlnet_cond_embedding
    edges = torch.randint(0, 2, (1, 1, 64, 64)).float()
    with torch.no_grad():
        made = torch.nn.functional.silu(reads.conv_in(edges.expand(-1, 3, -1, -1)))
        for block in reads.blocks:
            made = torch.nn.functional.silu(block(made))
    for _ in range(3):
        edges = torch.nn.functional.pixel_unshuffle(edges, 2)
    torch.testing.assert_close(made, edges * made.max())
    assert made.max() > 0.5
    assert [name for name, p in reads.named_parameters() if p.requires_grad] == ["conv_out.weight", "conv_out.bias"]
