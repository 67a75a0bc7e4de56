"""Every argument of diffusers' `__call__` does here what it does there, or is refused by one sentence."""

import inspect
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SIZE
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.inputs.others import check_others

PROMPTS = ["a red fox", "рыжий кот"]
CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(family: str, sd: Path, sdxl: Path) -> Iterator[Pipeline]:
    with Pipeline.load({"sd": sd, "sdxl": sdxl}[family]) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def theirs(family: str, checkpoints: dict[str, Path]) -> Any:
    pipe = DiffusionPipeline.from_pretrained(checkpoints[family], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, CLASSES[family])
    return pipe


def diffused(pipe: Any, **arguments: Any) -> Any:
    """What diffusers makes: pictures [N, H, W, 3] uint8, or latents."""
    size = {"width": SIZE[0], "height": SIZE[1], "guidance_scale": 0.0}
    images = pipe(**{"generator": seeded(7), "num_inference_steps": 2, **size, **arguments}).images
    return images if torch.is_tensor(images) else np.stack([np.asarray(picture) for picture in images])


def drawn(pipe: Pipeline, **arguments: Any) -> np.ndarray:
    """The same call of ours."""
    seed = {} if "generator" in arguments else {"seed": 7}
    images: np.ndarray = pipe(**{"num_inference_steps": 2, "output_type": "uint8", **seed, **arguments}).images
    return images


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(result: np.ndarray, reference: np.ndarray) -> None:
    assert result.dtype == np.uint8 and result.shape == reference.shape
    apart = np.abs(result.astype(int) - reference)
    assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3


def array(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(1))


STATES = {"sd": (1, 77, 64), "sdxl": (1, 77, 32 + 64)}
WITHOUT_GUIDANCE = {
    "negative_prompt": {"negative_prompt": "blurry"},
    "negative prompts": {"negative_prompt": ["blurry"]},
    "negative_prompt_2": {"negative_prompt_2": "blurry"},
    "guidance at 1": {"negative_prompt": "blurry", "guidance_scale": 1.0},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "negative_original_size": {"negative_original_size": (32, 32), "negative_target_size": (32, 32)},
    "negative_crops": {"negative_crops_coords_top_left": (8, 8)},
}
WITHOUT_EFFECT = {
    "prompt_2": {"prompt_2": ""},
    "eta": {"eta": 0.0},
    "denoising_end": {"denoising_end": 1.0},
    "original_size": {"original_size": SIZE[::-1]},
    "target_size": {"target_size": SIZE[::-1], "crops_coords_top_left": (0, 0)},
    "clip_skip": {"clip_skip": 0},
    "cross_attention_kwargs": {"cross_attention_kwargs": {}},
    "a scale of 1": {"cross_attention_kwargs": {"scale": 1.0}},
    "inputs of a callback": {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
    "return_dict": {"return_dict": True},
}


@pytest.mark.parametrize("case", [*WITHOUT_GUIDANCE, *WITHOUT_EFFECT])
def test_what_does_nothing_there_does_nothing_here(
    family: str, ours: Pipeline, theirs: Any, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """With one warning, if it was meant to do something."""
    arguments: dict[str, Any] = {**WITHOUT_GUIDANCE, **WITHOUT_EFFECT}[case]
    if not arguments.keys() <= inspect.signature(CLASSES[family].__call__).parameters.keys():
        pytest.skip("an argument of the other family")
    if case == "clip_skip" and family == "sd":
        pytest.skip("diffusers 0.42 cannot, with transformers 5: it looks for CLIPTextModel.text_model")
    with caplog.at_level(logging.WARNING, logger="turbochain"):
        result = drawn(ours, prompt=PROMPTS[0], **arguments)
    assert_same(result, diffused(theirs, prompt=PROMPTS[0], **arguments))
    warnings = [r.getMessage() for r in caplog.records if r.name == "turbochain"]
    named = [name for name in arguments if name != "guidance_scale"]
    assert warnings == (
        [f"{', '.join(named)}: without guidance this has no effect, as in diffusers"]
        if case in WITHOUT_GUIDANCE
        else []
    )


GUIDED: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 7.5},
    "no negative prompt is none": {"guidance_scale": 7.5, "negative_prompt": None},
    "an empty negative prompt": {"guidance_scale": 7.5, "negative_prompt": ""},
    "a negative prompt for all": {"guidance_scale": 3, "negative_prompt": "blurry"},
    "numpy's numbers": {"guidance_scale": np.float32(7.5), "num_images_per_prompt": np.int64(1)},
    "a negative prompt for each": {"guidance_scale": 1.5, "negative_prompt": ["blurry", "a dog"]},
}


@pytest.mark.parametrize("case", GUIDED)
def test_guidance(ours: Pipeline, theirs: Any, case: str) -> None:
    """For SDXL no negative prompt is zeros, and an empty one is its encoding; for SD they are one."""
    call = {"prompt": PROMPTS, **GUIDED[case]}
    result = drawn(ours, **call)
    if isinstance(negative := call.get("negative_prompt"), str):
        call["negative_prompt"] = [negative] * 2  # which SD's pipeline does not do for a list of prompts
    assert_same(result, diffused(theirs, **call))
    assert np.abs(result.astype(int) - drawn(ours, prompt=PROMPTS)).max() > 1


def test_negative_embeds_do_nothing(family: str, ours: Pipeline, theirs: Any) -> None:
    given = {"negative_prompt_embeds": array(*STATES[family])}
    if family == "sdxl":
        given["negative_pooled_prompt_embeds"] = array(1, 64)
    assert_same(drawn(ours, prompt=PROMPTS[0], **given), diffused(theirs, prompt=PROMPTS[0], **given))


REFUSED: dict[str, Any] = {
    "prompt_2": "a dog",
    "timesteps": [999, 499],
    "sigmas": np.array([14.6, 1.0]),
    "denoising_end": 0.8,
    "eta": 1.0,
    "ip_adapter_image": np.zeros((64, 64, 3), np.uint8),
    "ip_adapter_image_embeds": [array(1, 1, 64)],
    "return_dict": False,
    "cross_attention_kwargs": {"scale": 0.5},
    "original_size": (512, 512),
    "target_size": (512, 512),
    "crops_coords_top_left": (8, 8),
    "clip_skip": 1,
    "callback_on_step_end": print,
    "callback": print,
    "guidance_scale": float("nan"),
    "height": 72,
    "width": 72,
    "num_inference_steps": 50,
    "generator": "cpu",
    "latents": array(1, 4, 8, 8),
    "pooled_prompt_embeds": array(1, 64),
    "output_type": "pt",
    "num_images_per_prompt": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_one_sentence(ours: Pipeline, name: str) -> None:
    with pytest.raises(InputError) as caught:
        drawn(ours, prompt=PROMPTS[0], **{name: REFUSED[name]})
    message = str(caught.value)
    assert name in message and "\n" not in message and 20 < len(message) < 300


def test_every_argument_of_diffusers_is_known(family: str, ours: Pipeline) -> None:
    """Either a case above is about it, or it has a test of its own; and its default there is no TypeError here."""
    parameters = inspect.signature(CLASSES[family].__call__).parameters
    accepted = {name for case in (*WITHOUT_GUIDANCE.values(), *WITHOUT_EFFECT.values()) for name in case}
    tested_below = {"prompt", "prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    assert parameters.keys() - {"self", "kwargs"} <= accepted | REFUSED.keys() | tested_below
    for name, parameter in parameters.items():
        if name not in ("self", "prompt", "kwargs"):
            try:
                drawn(ours, **{"prompt": PROMPTS[0], name: parameter.default})
            except InputError as error:
                assert name in str(error) and parameter.default is not None


@pytest.mark.parametrize(
    "pipeline",
    [
        *(StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLImg2ImgPipeline),
        *(StableDiffusionXLInpaintPipeline, LatentConsistencyModelPipeline, LatentConsistencyModelImg2ImgPipeline),
    ],
)
def test_so_is_every_argument_of_the_other_tasks_pipelines(sd: Path, pipeline: type) -> None:
    """Either a call has it too, or its default is accepted, and anything else refused in a sentence."""
    chain, own = Bundle.open(sd).open_chain(), inspect.signature(Pipeline.__call__).parameters
    others = {n: p for n, p in inspect.signature(pipeline.__call__).parameters.items() if n not in own}
    for name in others.keys() - {"kwargs"}:
        check_others(chain, {name: others[name].default}, negative=True)
        if name != "callback_on_step_end_tensor_inputs":
            with pytest.raises(InputError, match=f"^{name} was given: "):
                check_others(chain, {name: object()}, negative=True)


def test_what_the_bundle_was_built_with_may_be_given(sd: Path) -> None:
    """Its layers of the text encoder, and the eta of its tables; 0 if it says nothing."""
    plain = Bundle.open(sd).open_chain()
    chains = {plain.name: replace(plain.chain, defaults={"guidance_scale": 0.0, "clip_skip": 1, "eta": 0.3})}
    bundle = plain.bundle
    built = replace(bundle, manifest=replace(bundle.manifest, chains=chains)).open_chain()
    check_others(plain, {"clip_skip": 0, "eta": 0.0}, negative=True)
    check_others(built, {"clip_skip": 1, "eta": 0.3}, negative=True)
    for chain, given in ((plain, {"eta": 0.3}), (built, {"eta": 0.0}), (plain, {"clip_skip": 1})):
        with pytest.raises(InputError, match=r"build a bundle with build-engine SOURCE --"):
            check_others(chain, given, negative=True)


def test_callbacks_have_a_substitute(ours: Pipeline) -> None:
    with pytest.raises(InputError, match=r"observe= .* cancel="):
        ours("a", callback_on_step_end=print)
    drawn(ours, prompt="a", callback_steps=1)


def test_a_misspelt_name_is_a_type_error(ours: Pipeline) -> None:
    with pytest.raises(TypeError, match="a call takes no argument 'num_inference_step'"):
        ours("a", num_inference_step=1)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_prompt_embeds(family: str, ours: Pipeline, theirs: Any, count: int, repeats: int) -> None:
    """Also if no prompt has them, and for more pictures than a pass makes; the prompt cache takes no part."""
    with torch.no_grad():
        encoded = theirs.encode_prompt(
            PROMPTS[:count], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    given = {"prompt_embeds": encoded[0]}
    if family == "sdxl":
        given["pooled_prompt_embeds"] = encoded[2]
    given = {name: value + 0.3 * array(*value.shape) for name, value in given.items()}
    reference = diffused(theirs, **given, num_images_per_prompt=repeats)
    assert np.abs(reference[0].astype(int) - diffused(theirs, prompt=PROMPTS[0])[0]).max() > 1
    kept, ran = len(ours.prompt_cache), []
    arrays = {name: value.numpy() for name, value in given.items()}
    result = drawn(ours, **arrays, num_images_per_prompt=repeats, observe=lambda graph, _: ran.append(graph))
    assert_same(result, reference)
    assert not any(graph.startswith("text") for graph in ran) and len(ours.prompt_cache) == kept


def test_prompt_embeds_that_are_not_what_the_model_reads(family: str, ours: Pipeline) -> None:
    states, pooled = np.zeros(STATES[family], np.float32), np.zeros((1, 64), np.float32)
    both = {"prompt_embeds": states} | ({"pooled_prompt_embeds": pooled} if family == "sdxl" else {})
    other = {"prompt_embeds": states} if family == "sdxl" else {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    cases: list[tuple[dict[str, Any], str]] = [
        (other, "pooled_prompt_embeds"),
        ({"pooled_prompt_embeds": pooled}, "without prompt_embeds"),
        ({**both, "prompt": "a"}, "prompt and prompt_embeds were given"),
        ({**both, "prompt_embeds": states[0]}, f"prompt_embeds is float32 {list(states.shape[1:])}: an array of"),
        ({**both, "prompt_embeds": states[:, :76]}, r"an array of float32 \[1, 77, "),
        ({**both, "prompt_embeds": states[:0]}, r"an array of float32 \[1, 77, "),
        ({**both, "prompt_embeds": states.astype(np.float16)}, "prompt_embeds is float16"),
        ({**both, "prompt_embeds": torch.from_numpy(states)}, r"for a torch tensor, give tensor\.detach\(\)\.float"),
        ({**both, "prompt_embeds": states * np.nan}, "NaN"),
    ]
    if family == "sdxl":
        cases.append(({**both, "pooled_prompt_embeds": np.zeros((2, 64), np.float32)}, r"float32 \[1, 64\]"))
    for arguments, message in cases:
        with pytest.raises(
            InputError, match=message.replace("[", r"\[") if message.startswith("prompt_embeds is float32") else message
        ):
            drawn(ours, **arguments)


@pytest.mark.parametrize("steps", [1, 3])
def test_latents_instead_of_pictures(ours: Pipeline, theirs: Any, steps: int) -> None:
    ran: list[str] = []
    call = {"prompt": PROMPTS, "num_inference_steps": steps, "num_images_per_prompt": 2, "output_type": "latent"}
    pictures = drawn(ours, prompt=PROMPTS[0])
    result = drawn(ours, **call, observe=lambda graph, _: ran.append(graph))
    reference = diffused(theirs, **call).numpy()
    assert result.dtype == np.float32 and result.shape == reference.shape == (4, 4, SIZE[1] // 8, SIZE[0] // 8)
    assert np.linalg.norm(result - reference) <= 1e-4 * np.linalg.norm(reference)
    assert "unet" in ran and "vae_decoder" not in ran
    np.testing.assert_array_equal(drawn(ours, prompt=PROMPTS[0]), pictures)  # the plans are told apart


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("seeds", [[2**64 - 1], [3, 2**33]], ids=["one for all", "one for each picture"])
def test_a_generator_is_its_seed_and_ends_after_what_was_drawn(
    family: str, ours: Pipeline, theirs: Any, steps: int, latents: bool, seeds: list[int]
) -> None:
    """So a second call with it is refused, if the first one has drawn. SDXL-Turbo's sampler draws between two steps."""
    mine, other, expected = ([seeded(s) for s in seeds] for _ in range(3))
    shape = 4, SIZE[1] // 8, SIZE[0] // 8
    given = {"latents": array(2, *shape)} if latents else {}
    call: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": steps}
    reference = diffused(theirs, **call, **given, generator=other if len(seeds) > 1 else other[0])
    call |= {name: value.numpy() for name, value in given.items()}
    call["generator"] = mine if len(seeds) > 1 else mine[0]
    assert_same(drawn(ours, **call), reference)

    draws = (not latents) + (steps - 1 if family == "sdxl" else 0)
    for one, torchs, diffusers, seed in zip(mine, expected, other, seeds, strict=True):
        for _ in range(draws):
            torch.randn(1 if len(seeds) > 1 else 2, *shape, generator=torchs)
        assert torch.equal(one.get_state(), torchs.get_state())
        assert family == "sdxl" or torch.equal(one.get_state(), diffusers.get_state())
        if draws:
            with pytest.raises(InputError, match="the generator has been drawn from"):
                drawn(ours, **call)
        one.manual_seed(seed)
    assert_same(drawn(ours, **call), reference)


def test_a_call_that_fails_leaves_the_generator_alone(ours: Pipeline) -> None:
    generator = seeded(5)
    with pytest.raises(InputError):
        drawn(ours, prompt="a", num_inference_steps=9, generator=generator)
    assert torch.equal(generator.get_state(), seeded(5).get_state())


def test_generators_that_may_be_seeds(ours: Pipeline) -> None:
    expected = drawn(ours, prompt="a")
    for generator in (7, np.int64(7), [7], [seeded(7)], (seeded(7),)):
        np.testing.assert_array_equal(drawn(ours, prompt="a", generator=generator), expected)


def test_generators_that_are_refused(ours: Pipeline) -> None:
    used, twice = seeded(1), seeded(1)
    torch.rand(1, generator=used)
    elsewhere = SimpleNamespace(
        device=torch.device("cuda", 0),
        **{name: lambda *_: 0 for name in ("initial_seed", "manual_seed", "get_state", "set_state")},
    )
    cases: dict[str, Any] = {
        "has been drawn from": used,
        "the generator is on cuda:0": elsewhere,
        "stands twice in the list": [twice, twice],
        "is of type RandomState: a torch.Generator": np.random.RandomState(0),
        "True: expected an integer": True,
        "-1: expected an integer": -1,
        "one integer for each of 2 pictures": [seeded(1)],
    }
    for message, generator in cases.items():
        with pytest.raises(InputError, match=message):
            drawn(ours, prompt=PROMPTS, generator=generator)
    with pytest.raises(InputError, match="seed and generator were given"):
        ours("a", seed=1, generator=seeded(1))
