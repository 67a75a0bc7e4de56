"""Checkpoints with textual inversions: every text gives diffusers' ids, and every prompt diffusers' picture.

Only the text encoders differ from the shared miniatures, by the rows of their embeddings; the other graphs are theirs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BATCH, FAMILIES, BundleFactory
from safetensors.numpy import load_file
from test_parity import assert_same_picture, load_diffusers, theirs
from test_schedulers import export_with

from turbochain.export import inversion, tables
from turbochain.export.sources.checkpoint import open_folder
from turbochain.runtime import Bundle, InputError, Pipeline, VerificationError
from turbochain.runtime.inputs.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = {"<cat-toy>": (3, 2), "<dog>": (1, 1), "Midjourney": (2, 3), "<cat": (2, 1)}
"""Token → how many vectors each of SDXL's two text encoders has for it; SD has the first."""

FEEDS = ("input_ids", "input_ids_2")
"""What takes the ids of SDXL's prompts."""

PROMPTS = (
    "a photo of a <cat-toy> in the snow",
    "<cat-toy><cat-toy>, and a <dog> with <cat-toy>",
    "a <cat-toy>_1 alone",
    "MIDJOURNEY midjourney, Midjourney",
    "a <caterpillar",
    "a <CAT-TOY> in capitals",
    "<cat-toy> " * 40,
    "no token",
)


def with_inversions(checkpoint: Path, folder: Path) -> Any:
    """Save the checkpoint with `VECTORS` loaded into it; return diffusers' pipeline."""
    pipe, generator = load_diffusers(checkpoint), torch.Generator().manual_seed(0)
    for i, number in enumerate(("", "_2")):
        if (encoder := getattr(pipe, f"text_encoder{number}", None)) is None:
            continue
        for token, counts in VECTORS.items():
            vectors = torch.randn(counts[i], encoder.config.hidden_size, generator=generator)
            pipe.load_textual_inversion(
                {token: vectors}, token=token, text_encoder=encoder, tokenizer=getattr(pipe, f"tokenizer{number}")
            )
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("")
    return load_diffusers(folder)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def made(
    request: pytest.FixtureRequest,
    bundle_of: BundleFactory,
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Bundle]:
    """diffusers' pipeline of a checkpoint with inversions, and the bundle of that checkpoint."""
    folder = tmp_path_factory.mktemp("inversion")
    family = request.param
    pipe = with_inversions(checkpoints[family], folder / "checkpoint")
    donor, batch = Bundle.open(bundle_of(family)), BATCH[family, "fp32"]
    return pipe, export_with((1,), folder / "checkpoint", donor, batch, folder / "x.bundle")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_those_that_diffusers_feeds(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pipe = with_inversions(checkpoints[family], tmp_path / "checkpoint")
    checkpoint = open_folder(tmp_path / "checkpoint")
    for name, entry in tables.tokenizers(checkpoint, checkpoint.family.tokenizers, tmp_path).items():
        tokenizer = Tokenizer(tmp_path / entry.file, **{k: v for k, v in vars(entry).items() if k != "file"})
        reference = getattr(pipe, name.replace("input_ids", "tokenizer"))
        for prompt in PROMPTS:
            converted = pipe.maybe_convert_prompt(prompt, reference)
            expected = reference(converted, padding="max_length", truncation=True).input_ids
            assert tokenizer.encode([prompt]).tolist() == [expected], prompt
            assert bool(tokenizer.dropped(prompt)) == (len(reference(converted).input_ids) > 77)


def test_the_pictures_are_those_of_diffusers(made: tuple[Any, Bundle]) -> None:
    """Loading the bundle verifies it."""
    reference, bundle = made
    assert "expansions" in bundle.manifest.requires
    count = bundle.open_chain().batch
    with Pipeline.load(bundle.path) as pipe:
        for i in range(0, len(PROMPTS), count):
            prompt = [PROMPTS[(i + row) % len(PROMPTS)] for row in range(count)]
            call = {"prompt": prompt, "num_inference_steps": 1, "seed": i}
            assert_same_picture(pipe(**call, output_type="uint8").images, theirs(reference, call))  # type: ignore[arg-type]


def test_the_reference_has_every_added_token(made: tuple[Any, Bundle]) -> None:
    pipe, bundle = made
    recorded = load_file(bundle.path / "reference.safetensors")
    feeds = {"sd": FEEDS[:1], "sdxl": FEEDS}[bundle.manifest.family]
    assert {*bundle.manifest.tokenizers} == {*feeds, *(f"negative_{name}" for name in feeds)}
    for name in feeds:
        tokenizer = getattr(pipe, name.replace("input_ids", "tokenizer"))
        seen = np.concatenate([v.ravel() for key, v in recorded.items() if key.partition("/")[2] == name])
        assert {*tokenizer.added_tokens_encoder.values()} <= {*seen.tolist()}


@pytest.mark.parametrize("expansions", [None, {"<cat-toy>": 2, "Midjourney": 2, "<cat": 2}])
def test_a_bundle_that_expands_otherwise_is_not_loaded(
    made: tuple[Any, Bundle], copy_of: Callable[[Path], Path], expansions: dict[str, int] | None
) -> None:
    path = copy_of(made[1].path)
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["tokenizers"]["input_ids"]["expansions"]
    if expansions:
        manifest["tokenizers"]["input_ids"]["expansions"] = expansions
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="ids: fraction_differing is"):
        Pipeline.load(path)


def test_many_tokens_share_few_prompts(checkpoints: dict[str, Path]) -> None:
    """20 tokens with 10 vectors each need three prompts of 75 ids; one with 100 vectors cannot be reached by its name
    alone."""
    pipe = load_diffusers(checkpoints["sd"])
    for i in range(20):
        pipe.tokenizer.add_tokens([f"<{chr(97 + i)}>", *(f"<{chr(97 + i)}>_{n}" for n in range(1, 10))])
    prompts = inversion.prompts(pipe, [pipe.tokenizer])
    assert len(prompts) == 3
    pipe.tokenizer.add_tokens(["<long>", *(f"<long>_{n}" for n in range(1, 100))])
    prompts = inversion.prompts(pipe, [pipe.tokenizer])
    converted = pipe.maybe_convert_prompt(prompts, pipe.tokenizer)
    seen = {id_ for ids in pipe.tokenizer(converted, truncation=True).input_ids for id_ in ids}
    assert {*pipe.tokenizer.added_tokens_encoder.values()} - {pipe.tokenizer.pad_token_id} <= seen


def test_a_token_that_the_text_encoder_lacks_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pipe = load_diffusers(checkpoints["sd"])
    pipe.tokenizer.add_tokens(["<cat-toy>", "<dog>"])
    pipe.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"has the added token '<cat-toy>' \(2 in all\), and its text encoder has"):
        tables.tokenizers(open_folder(tmp_path / "checkpoint"), {"input_ids": "tokenizer"}, tmp_path)


@pytest.mark.parametrize(
    "setting", [{"padding_side": "left"}, {"truncation_side": "left"}, {"split_special_tokens": True}]
)
def test_a_tokenizer_that_works_otherwise_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, setting: dict[str, Any]
) -> None:
    shutil.copytree(checkpoints["sd"], tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"{name}={value!r}, supported is"):
        tables.tokenizers(open_folder(tmp_path / "checkpoint"), {"input_ids": "tokenizer"}, tmp_path)
