"""OpenAI's own client against the server; the pictures are those of the pipeline."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clients
import httpx2
import numpy as np
import openai
import pytest
from asking import until
from openai.types import (
    ImageEditCompletedEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image, ImageOps
from serving import Serving, serving
from skimage.metrics import peak_signal_noise_ratio
from told import GREY, Told
from uploads import file, holed, noise

from turbochain.runtime import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.serve import encoding
from turbochain.runtime.serve.errors import overloaded
from turbochain.runtime.serve.openai import Body
from turbochain.runtime.serve.source import Drawn


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def api(server: Serving) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{server.url}/v1", timeout=60) as found:
        yield found


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


def post(api: httpx2.Client, path: str, **how: Any) -> dict[str, Any]:
    answer = api.post(path, **how)
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_drawn(pipe: Pipeline, answer: dict[str, Any], **call: Any) -> None:
    """See that the answer's pictures are those of the pipeline's call."""
    expected = pipe(output_type="uint8", seed=[item["seed"] for item in answer["data"]], **call).images
    for item, right in zip(answer["data"], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(picture(item["b64_json"])), right)


@pytest.mark.parametrize("body", [clients.OPEN_WEBUI_GENERATION, clients.LIBRECHAT_GENERATION])
def test_generations_of_known_clients(api: httpx2.Client, pipe: Pipeline, body: dict[str, Any]) -> None:
    answer = post(api, "images/generations", json=body)
    assert "url" not in answer["data"][0]  # Open WebUI would fetch it
    assert picture(answer["data"][0]["b64_json"]).format == "PNG"
    assert_drawn(pipe, answer, prompt="a cat")


@pytest.mark.parametrize(
    ("form", "field"),
    [(clients.OPEN_WEBUI_EDIT, "image"), (clients.OPEN_WEBUI_EDIT, "image[]"), (clients.LIBRECHAT_EDIT, "image[]")],
)
def test_edits_of_known_clients(api: httpx2.Client, pipe: Pipeline, form: dict[str, str], field: str) -> None:
    image = noise((80, 40))
    answer = post(api, "images/edits", data=form, files=[(field, ("a.png", file(image), "image/png"))])
    assert_drawn(pipe, answer, prompt="a dog", image=image, num_inference_steps=2, strength=0.5)


def test_fields_may_be_null(api: httpx2.Client, pipe: Pipeline) -> None:
    body: dict[str, Any] = dict.fromkeys(Body.model_fields)
    assert_drawn(pipe, post(api, "images/generations", json=body | {"prompt": "a cat"}), prompt="a cat")


def test_fields_may_be_empty(api: httpx2.Client, pipe: Pipeline) -> None:
    body = dict.fromkeys(Body.model_fields, "") | {"prompt": "a cat", "quality": ""}
    assert_drawn(pipe, post(api, "images/generations", json=body), prompt="a cat")


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_pictures_are_compressed_as_asked(api: httpx2.Client, pipe: Pipeline, kind: str) -> None:
    right, sizes = pipe("a cat", seed=[7], output_type="uint8").images[0], []
    for compression in (100, 60, 5):
        body = {"prompt": "a cat", "seed": 7, "output_format": kind, "output_compression": compression}
        answer = post(api, "images/generations", json=body)
        (item,) = answer["data"]
        made = picture(item["b64_json"])
        assert (made.format, answer["output_format"]) == (kind.upper(), kind)
        sizes.append(len(base64.b64decode(item["b64_json"])))
        assert peak_signal_noise_ratio(right, np.asarray(made)) > (20 if compression == 100 else 10)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]


def test_strict_sizes(sd: Path) -> None:
    source = Told()
    with serving(sd, source=source, strict_size=True) as found, ThreadPoolExecutor() as pool:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a cat", size="512x512")
        assert (refused.value.param, source.asked) == ("size", {})
        drawn = pool.submit(client.images.generate, prompt="a cat", size="64x64", extra_body={"seed": 7})
        until(lambda: 7 in source.asked)
        found.loop.call_soon_threadsafe(source.asked[7][1].set_result, GREY)
        assert drawn.result().size == "64x64"


def test_numbers_of_a_form_are_texts(api: httpx2.Client, pipe: Pipeline) -> None:
    image = noise((64, 64))
    form = {"prompt": "a dog", "n": "2", "seed": "7", "num_inference_steps": "4", "strength": "0.5", "user": ""}
    form |= {"output_format": "png", "stream": "false", "partial_images": "0", "output_compression": "100"}
    answer = post(api, "images/edits", data=form, files={"image": file(image)})
    assert [item["seed"] for item in answer["data"]] == [7, 8]
    assert_drawn(pipe, answer, prompt=["a dog"] * 2, image=image, num_inference_steps=4, strength=0.5)


@pytest.mark.parametrize("kind", ["jpeg", "turned jpeg", "webp", "palette", "grey"])
def test_kinds_of_uploads(api: httpx2.Client, pipe: Pipeline, kind: str) -> None:
    image = noise((80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    uploads = {
        "jpeg": file(image, "JPEG"),
        "turned jpeg": file(image, "JPEG", exif=exif),
        "webp": file(image, "WEBP"),
        "palette": file(image.convert("P"), transparency=3),
        "grey": file(image.convert("L")),
    }
    right = Image.open(io.BytesIO(uploads[kind]))
    right = ImageOps.exif_transpose(right).convert("RGB")
    answer = post(api, "images/edits", data={"prompt": "a dog"}, files={"image": uploads[kind]})
    assert_drawn(pipe, answer, prompt="a dog", image=right, num_inference_steps=2, strength=0.5)


def test_what_is_transparent_is_repainted(guided_server: Serving, guided: Path) -> None:
    image, mask = noise((64, 64)), holed((32, 16))  # of another size
    palette = mask.getchannel("A").convert("P")  # index 0, black, is transparent
    masks = [file(mask), file(mask, "WEBP", lossless=True), file(palette, transparency=0)]
    client = openai.OpenAI(base_url=f"{guided_server.url}/v1", api_key="none", max_retries=0)
    how = {"seed": 7, "num_inference_steps": 2, "strength": 1.0}
    found = [
        client.images.edit(image=("a.png", file(image)), mask=("m", m), prompt="a dog", extra_body=how) for m in masks
    ]
    listed = client.images.edit(image=[("a.png", file(image))], mask=("m", masks[0]), prompt="a dog", extra_body=how)
    answers = [answer.to_dict() for answer in [*found, listed]]
    assert len({answer["data"][0]["b64_json"] for answer in answers}) == 1  # type: ignore[index]
    white = ImageOps.invert(mask.getchannel("A"))
    with Pipeline.load(guided, threads=1) as pipe:
        call = {"num_inference_steps": 2, "strength": 1.0, "prompt": "a dog"}
        assert_drawn(pipe, answers[0], image=image, mask_image=white, **call)


def test_models(client: openai.OpenAI, two_models: Serving, guided: Path) -> None:
    assert client.images.generate(prompt="a", model="dall-e-2").to_dict()["model"] == "sd-fp32"
    two = openai.OpenAI(base_url=f"{two_models.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in two.models.list()] == ["sd-fp32", "guided"]
    assert two.models.retrieve("guided").created == int((guided / "bundle.json").stat().st_mtime)
    for call in (two.models.retrieve, lambda name: two.images.generate(prompt="a", model=name)):
        with pytest.raises(openai.NotFoundError) as refused:
            call("dall-e-2")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert two.images.generate(prompt="a", model="guided").to_dict()["model"] == "guided"
    assert two.images.generate(prompt="a").to_dict()["model"] == "sd-fp32"


def test_a_stream_sends_pictures_of_fewer_steps_first(client: openai.OpenAI, pipe: Pipeline) -> None:
    how = {"seed": 7, "num_inference_steps": 4}
    events = [*client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=how)]
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    for event, steps in zip(events, (1, 2, 4), strict=True):
        answer = {"data": [{"b64_json": event.b64_json, "seed": 7}]}
        assert_drawn(pipe, answer, prompt="a cat", num_inference_steps=steps)


def test_the_picture_of_an_edit_is_resized_off_the_loop_and_once_for_all_seeds(
    client: openai.OpenAI, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, make = [], Request.make

    def noted(*given: Any, **more: Any) -> Request:
        threads.append(threading.current_thread().name)
        return make(*given, **more)

    monkeypatch.setattr(Request, "make", noted)
    image, how = noise((80, 40)), {"seed": 7, "num_inference_steps": 4, "strength": 1.0}
    upload = ("a.png", file(image))
    events = [*client.images.edit(image=upload, prompt="a", n=2, stream=True, partial_images=2, extra_body=how)]
    assert len(threads) == 3 and "serving" not in threads  # one for each step count
    monkeypatch.undo()
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"] + [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    for event, seed, steps in zip(events, (7, 7, 7, 8, 8, 8), (1, 2, 4) * 2, strict=True):
        answer = {"data": [{"b64_json": event.b64_json, "seed": seed}]}
        assert_drawn(pipe, answer, prompt="a", image=image, num_inference_steps=steps, strength=1.0)


def test_two_uploads_are_decoded_at_a_time(api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, under_way, most, decode = threading.Event(), list[str](), list[int](), encoding.decode

    def waits(argument: str, file: bytes) -> Image.Image:
        under_way.append(argument)
        most.append(len(under_way))
        assert gate.wait(20)
        under_way.pop()
        return decode(argument, file)

    monkeypatch.setattr("turbochain.runtime.serve.openai.decode", waits)
    upload = {"image": ("a.png", file(noise((64, 64))))}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(api.post, "images/edits", data={"prompt": "a"}, files=upload) for _ in range(6)]
        until(lambda: len(under_way) == 2)
        assert api.get("models").status_code == 200
        gate.set()
        assert [one.result().status_code for one in asked] == [200] * 6
    assert len(most) == 6 and max(most) == 2


def test_answers_are_of_the_client_s_types(client: openai.OpenAI) -> None:
    """Which it does not check by itself."""
    upload = ("a.png", file(noise((64, 64))))
    partial: dict[str, Any] = {"stream": True, "partial_images": 1, "extra_body": {"num_inference_steps": 2}}
    answers = [
        (client.images.generate(prompt="a"), [ImagesResponse]),
        (client.images.edit(image=upload, prompt="a"), [ImagesResponse]),
        (client.images.generate(prompt="a", **partial), [ImageGenPartialImageEvent, ImageGenCompletedEvent]),
        (client.images.edit(image=upload, prompt="a", **partial), [ImageEditCompletedEvent]),
    ]
    for answer, types in answers:
        found = [answer] if isinstance(answer, ImagesResponse) else [*answer]
        for one, type in zip(found, types, strict=True):
            type.model_validate(one.to_dict())


def test_an_error_in_a_stream_is_one_of_the_client(sd: Path) -> None:
    source = Told()
    with serving(sd, source=source) as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0)

        def settle(seed: int, with_: Callable[[asyncio.Future[Drawn]], None]) -> None:
            until(lambda: seed in source.asked)
            found.loop.call_soon_threadsafe(with_, source.asked[seed][1])

        with ThreadPoolExecutor() as pool:
            pool.submit(settle, 7, lambda future: future.set_result(GREY))
            events = client.images.generate(prompt="a cat", n=2, stream=True, extra_body={"seed": 7})
            assert next(events).type == "image_generation.completed"
            pool.submit(settle, 8, lambda future: future.set_exception(overloaded("no room", 3)))
            with pytest.raises(openai.APIError, match="no room"):
                next(events)
