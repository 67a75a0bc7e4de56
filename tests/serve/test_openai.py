"""OpenAI's own client against the server; the pictures are those of the pipeline."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from serving import Serving

from turbochain.runtime import Pipeline


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Any:
    with Pipeline.load(sd, threads=1) as pipe:
        yield pipe


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_picture_i_of_n_is_that_of_the_seed_plus_i(client: openai.OpenAI, pipe: Pipeline) -> None:
    last = 2**64 - 1
    answer = client.images.generate(prompt="a cat", n=2, extra_body={"seed": last, "num_inference_steps": 2})
    assert answer.to_dict()["seed"] == last
    assert (answer.size, answer.output_format) == ("64x64", "png")
    expected = pipe(["a cat"] * 2, seed=[last, 0], num_inference_steps=2, output_type="uint8").images
    for item, right, seed in zip(answer.data or [], expected, (last, 0), strict=True):
        got = picture(item.b64_json or "")
        np.testing.assert_array_equal(np.asarray(got), right)
        assert got.text == {"prompt": "a cat", "seed": str(seed), "model": "sd-fp32"}  # type: ignore[attr-defined]
