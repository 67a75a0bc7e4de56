"""What OpenAI's API refuses: the error object names the field, and says why in plain words."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image
from serving import Serving
from uploads import file, holed


@pytest.fixture(scope="module")
def api(server: Serving) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{server.url}/v1", timeout=60) as found:
        yield found


REFUSED: dict[str, tuple[Any, str | None]] = {
    "no prompt": ({}, "prompt"),
    "null": ({"prompt": None}, "prompt"),
    "a NUL": ({"prompt": "\0"}, "prompt"),
    "a lone surrogate": ({"prompt": "\ud800"}, "prompt"),
    "a long prompt": ({"prompt": "a" * 40_000}, "prompt"),
    "a list of prompts": ({"prompt": ["a"]}, "prompt"),
    "a size in words": ({"size": "large"}, "size"),
    "no size": ({"size": "0x64"}, "size"),
    "a seed below 0": ({"seed": -1}, "seed"),
    "a large seed": ({"seed": 2**64}, "seed"),
    "a broken seed": ({"seed": 1.5}, "seed"),
    "a true seed": ({"seed": True}, "seed"),
    "a false scale": ({"guidance_scale": False}, "guidance_scale"),
    "svg": ({"output_format": "svg"}, "output_format"),
    "url": ({"response_format": "url"}, "response_format"),
    "no pictures": ({"n": 0}, "n"),
    "too many": ({"n": 11}, "n"),
    "steps that are not built": ({"num_inference_steps": 7}, "num_inference_steps"),
    "no finite scale": ({"guidance_scale": float("nan")}, "guidance_scale"),
    "a long negative prompt": ({"guidance_scale": 2.0, "negative_prompt": "a" * 40_000}, "negative_prompt"),
    "compression": ({"output_compression": 101}, "output_compression"),
    "partial pictures": ({"partial_images": -1}, "partial_images"),
    "a stream with an error": ({"size": "large", "stream": True}, "size"),
    "a list": ([], None),
    "a text": ("a cat", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(api: httpx2.Client, name: str) -> None:
    body, param = REFUSED[name]
    body = {"prompt": "a cat", **body} if isinstance(body, dict) and body else body
    answer = api.post("images/generations", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert_refused(answer, 400, param)


def assert_refused(answer: httpx2.Response, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    (key,) = answer.json()
    error = answer.json()[key]
    assert (key, error["type"], error["param"]) == ("error", "invalid_request_error", param)
    assert error["message"] and error.keys() == {"message", "type", "param", "code"}


PICTURE = file(Image.new("RGB", (64, 64)))
REFUSED_EDITS: dict[str, tuple[list[tuple[str, bytes]], dict[str, str], str | None]] = {
    "no picture": ([], {}, "image"),
    "two pictures": ([("image[]", PICTURE), ("image[]", PICTURE)], {}, "image"),
    "two in two ways": ([("image[]", PICTURE), ("image", PICTURE)], {}, "image"),
    "a damaged picture": ([("image", PICTURE[:60])], {}, "image"),
    "no file of a picture": ([("image", b"GIF89a")], {}, "image"),
    "an empty file": ([("image", b"")], {}, "image"),
    "a mask without transparency": ([("image", PICTURE), ("mask", PICTURE)], {}, "mask"),
    "a damaged mask": ([("image", PICTURE), ("mask", b"\x89PNG")], {}, "mask"),
    "two masks": ([("image", PICTURE), ("mask", PICTURE), ("mask", PICTURE)], {}, "mask"),
    "no prompt": ([("image", PICTURE)], {"prompt": ""}, "prompt"),
    "a count in words": ([("image", PICTURE)], {"n": "two"}, "n"),
    "a strength above 1": ([("image", PICTURE)], {"strength": "1.5"}, "strength"),
    "a size in words": ([("image", PICTURE)], {"size": "large"}, "size"),
}


@pytest.mark.parametrize("name", REFUSED_EDITS)
def test_a_refused_edit_names_the_field(api: httpx2.Client, name: str) -> None:
    files, form, param = REFUSED_EDITS[name]
    named = [(field, ("a.png", content)) for field, content in files] or [("unknown", ("a.png", PICTURE))]
    assert_refused(api.post("images/edits", data={"prompt": "a dog", **form}, files=named), 400, param)


def test_a_task_that_is_not_built_is_refused(api: httpx2.Client) -> None:
    files = {"image": PICTURE, "mask": file(holed((64, 64)))}
    answer = api.post("images/edits", data={"prompt": "a dog"}, files=files)
    assert_refused(answer, 400, None)
    assert "inpainting" in answer.json()["error"]["message"]


def test_a_body_that_is_no_object_is_refused_in_plain_words(api: httpx2.Client) -> None:
    for body, why in {
        '{"prompt": "a"': "the body is no JSON: .* at character 14",
        "[1]": "no JSON object",
        "": "no JSON",
    }.items():
        answer = api.post("images/generations", content=body, headers={"Content-Type": "application/json"})
        assert_refused(answer, 400, None)
        assert re.search(why, answer.json()["error"]["message"])


def test_a_form_that_is_none_is_refused(api: httpx2.Client) -> None:
    for kind, why in (("multipart/form-data", "boundary"), ("multipart/form-data; boundary=x", "Invalid multipart")):
        answer = api.post("images/edits", content=b"\r\n--y\r\n", headers={"Content-Type": kind})
        assert_refused(answer, 400, None)
        assert why in answer.json()["error"]["message"]
    assert_refused(api.post("images/edits", json={"prompt": "a dog"}), 400, "image")


def test_unknown_paths_and_methods(api: httpx2.Client) -> None:
    assert_refused(api.post("chat/completions", json={}), 404, None)
    assert_refused(api.get("images/generations"), 405, None)
