"""A1111's API with its clients' own requests: the pictures, and the `info` about them, are right."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import clients
import httpx2
import numpy as np
import pytest
from asking import until
from PIL import Image
from serving import Serving, serving
from told import GREY, Told

from turbochain.runtime import Pipeline
from turbochain.runtime.serve.drawings import Drawing
from turbochain.runtime.serve.errors import overloaded
from turbochain.runtime.serve.source import Job
from turbochain.runtime.serve.wanted import Wanted, request


@pytest.fixture(scope="module")
def api(server: Serving) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{server.url}/sdapi/v1", timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def guided_api(guided_server: Serving) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{guided_server.url}/sdapi/v1", timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd, threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def guided_pipe(guided: Path) -> Iterator[Pipeline]:
    with Pipeline.load(guided, threads=1) as found:
        yield found


JSON = {"Content-Type": "application/json"}


def post(api: httpx2.Client, path: str, body: object) -> dict[str, Any]:
    answer = api.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def sent(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def assert_drawn(pipe: Pipeline, images: list[str], **call: Any) -> None:
    """See that the pictures are those of the pipeline's call."""
    expected = pipe(output_type="uint8", **call).images
    for text, right in zip(images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(picture(text)), right)


def test_sillytavern(api: httpx2.Client, pipe: Pipeline) -> None:
    """The calls that it makes when it connects, chooses a model and draws; nothing else on the server is drawn."""
    basic = {"Authorization": "Basic"}  # as Node sends it without a password
    options = api.get("options", headers=basic).json()
    assert "forge_preset" not in options  # else it takes the server for Forge
    for path, field in clients.SILLYTAVERN_LISTS.items():
        entries = api.get(path, headers=basic).json()
        assert isinstance(entries, list) and all(isinstance(entry[field], str) for entry in entries), path
    title = api.get("sd-models").json()[0]["title"]
    assert title == options["sd_model_checkpoint"] == "sd-fp32"
    assert api.post("options", json={"sd_model_checkpoint": title}).is_success
    progress = api.get("progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)
    answer = post(api, "txt2img", clients.SILLYTAVERN)
    seed = json.loads(answer["info"])["seed"]
    assert_drawn(pipe, answer["images"], prompt=clients.SILLYTAVERN["prompt"], seed=seed, num_inference_steps=4)
    assert api.post("interrupt", headers=basic).is_success  # without a body; there is nothing to end


def test_open_webui(api: httpx2.Client, pipe: Pipeline) -> None:
    options = api.get("options").json()
    assert [(m["title"], m["model_name"]) for m in api.get("sd-models").json()] == [("sd-fp32", "sd-fp32")]
    assert api.post("options", json=options | {"sd_model_checkpoint": "sdxl.safetensors [31e35c80fc]"}).is_success
    assert api.get("options").json() == options  # there is no such model: its own stays
    answer = post(api, "txt2img", clients.OPEN_WEBUI_A1111)
    assert not any("," in image for image in answer["images"])  # it would take what is before it for a media type
    assert all(picture(image).format == "PNG" for image in answer["images"])
    seeds = json.loads(answer["info"])["all_seeds"]
    assert seeds[1] == seeds[0] + 1
    for image, seed in zip(answer["images"], seeds, strict=True):
        assert_drawn(pipe, [image], prompt="a cat", seed=seed, num_inference_steps=4)


def test_librechat(api: httpx2.Client) -> None:
    answer = post(api, "txt2img", clients.LIBRECHAT_A1111)
    info = json.loads(answer["info"])
    assert picture(answer["images"][0]).size == (info["width"], info["height"]) == (64, 64)
    assert info["infotexts"][0].split("\n")[-1].startswith("Steps: 4, ")
    assert f"Seed: {info['seed']}, " in info["infotexts"][0]


def test_what_is_told_is_what_was_drawn(guided_api: httpx2.Client, guided_pipe: Pipeline) -> None:
    body = {**clients.SILLYTAVERN, "steps": 3, "seed": 2**64 - 1, "batch_size": 1, "n_iter": 2}
    answer = post(guided_api, "txt2img", body)
    assert answer["parameters"] == body
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [2**64 - 1, 0]
    assert info["all_prompts"] == [info["prompt"]] * 2 and info["all_negative_prompts"] == [info["negative_prompt"]] * 2
    call = {"num_inference_steps": info["steps"], "guidance_scale": info["cfg_scale"], "seed": info["all_seeds"]}
    assert (info["steps"], info["cfg_scale"], info["denoising_strength"]) == (2, 7.0, None)
    texts = {"prompt": info["all_prompts"], "negative_prompt": info["all_negative_prompts"]}
    assert texts["negative_prompt"][0] == body["negative_prompt"]
    assert_drawn(guided_pipe, answer["images"], **texts, **call)
    for image, infotext, seed in zip(answer["images"], info["infotexts"], info["all_seeds"], strict=True):
        assert picture(image).text == {"parameters": infotext}  # type: ignore[attr-defined]
        prompt, negative, last = infotext.split("\n")
        assert (prompt, negative) == (body["prompt"], f"Negative prompt: {body['negative_prompt']}")
        values = dict(pair.split(": ") for pair in last.split(", "))
        assert values.items() >= {"Steps": "2", "CFG scale": "7.0", "Seed": str(seed), "Size": "64x64"}.items()
        assert values["Model"] == info["sd_model_name"] == "guided"


def test_without_guidance_the_scale_is_one(api: httpx2.Client) -> None:
    answer = post(api, "txt2img", clients.SILLYTAVERN)
    info = json.loads(answer["info"])
    assert (info["cfg_scale"], info["negative_prompt"], "Negative prompt" in info["infotexts"][0]) == (1.0, "", False)


ODD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {"prompt": "", "steps": 4}),
    "nulls": (
        dict.fromkeys(("negative_prompt", "seed", "steps", "cfg_scale", "width", "n_iter", "mask")),
        {"steps": 4},
    ),
    "texts": ({"steps": "2", "cfg_scale": "7", "width": "512", "seed": "5"}, {"steps": 2, "seed": 5}),
    "empty texts": ({"seed": "", "steps": ""}, {"steps": 4}),
    "whole floats": ({"steps": 2.0, "seed": 5.0}, {"steps": 2, "seed": 5}),
    "no steps": ({"steps": 0}, {"steps": 1}),
    "one side": ({"width": 4096}, {"width": 64, "height": 64}),
    "a NUL in what is ignored": ({"sampler_name": "\0\ud800"}, {"steps": 4}),
    "another script": ({"prompt": "猫, 🐈", "steps": 1}, {"prompt": "猫, 🐈"}),
    "mark-up": ({"prompt": "<x:1> (cat:1.2)\nBREAK, [dog]"}, {"prompt": "<x:1> (cat:1.2)\nBREAK, [dog]"}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_bodies_are_drawn(api: httpx2.Client, name: str) -> None:
    body, expected = ODD[name]
    posted = api.post("txt2img", content=json.dumps(body), headers=JSON)
    assert posted.status_code == 200, posted.text
    answer = posted.json()
    assert answer["parameters"] == body
    info = json.loads(answer["info"])
    assert info.items() >= expected.items()
    (image,) = answer["images"]
    assert picture(image).text == {"parameters": info["infotexts"][0]}  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[str, object, str | None]] = {
    "too many": ("txt2img", {"batch_size": 4, "n_iter": 3}, "batch_size"),
    "no count": ("txt2img", {"n_iter": 0}, "n_iter"),
    "words": ("txt2img", {"steps": "many"}, "steps"),
    "an impossible side": ("txt2img", {"width": -64, "height": 64}, "width"),
    "a large seed": ("txt2img", {"seed": 2**64}, "seed"),
    "a list": ("txt2img", [1], None),
    "a NUL": ("txt2img", {"prompt": "a\0"}, "prompt"),
    "a lone surrogate": ("txt2img", {"prompt": "\ud800"}, "prompt"),
    "no picture": ("img2img", {"prompt": "a cat"}, "init_images"),
    "two pictures": ("img2img", {"init_images": ["", ""]}, "init_images"),
    "no base64": ("img2img", {"init_images": ["?"]}, "init_images"),
    "a damaged picture": ("img2img", {"init_images": [sent(Image.new("RGB", (64, 64)))[:60]]}, "init_images"),
    "a path": ("img2img", {"init_images": ["/etc/passwd"]}, "init_images"),
    "an address": ("img2img", {"init_images": ["http://localhost/a.png"]}, "init_images"),
    "a task that is not built": (
        "img2img",
        {"init_images": [sent(Image.new("RGB", (64, 64)))], "mask": sent(Image.new("L", (64, 64)))},
        None,
    ),
    "another route": ("png-info", {}, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(api: httpx2.Client, name: str) -> None:
    path, body, param = REFUSED[name]
    answer = api.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == (404 if path == "png-info" else 400)
    found = answer.json()
    assert found["error"]["param"] == param
    assert found["detail"] == found["errors"] == found["error"]["message"] != ""


@pytest.mark.parametrize("text", ["", "{", '{"steps": NaN}', '{"unknown": 1e999}', "[" * 100_000])
def test_what_is_no_json_is_refused(api: httpx2.Client, text: str) -> None:
    for path in ("txt2img", "options"):
        answer = api.post(path, content=text, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_options_take_any_json(api: httpx2.Client) -> None:
    for value in (None, [], 1, "sd-fp32", {"sd_model_checkpoint": ["sd-fp32"]}, {"outdir_samples": "/etc"}):
        assert api.post("options", content=json.dumps(value), headers=JSON).status_code == 200
    assert api.get("options").json()["sd_model_checkpoint"] == "sd-fp32"


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    """A picture of random levels."""
    shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8).squeeze(), mode)


@pytest.mark.parametrize(("asked", "steps", "used"), [(0.6, 4, 0.5), (0.0, 4, 0.25), (3.0, 2, 1.0), (None, 4, 0.75)])
def test_img2img(api: httpx2.Client, pipe: Pipeline, asked: float | None, steps: int, used: float) -> None:
    image = noise("RGB", (80, 40))
    body = {"prompt": "a dog", "init_images": [sent(image)], "seed": 7, "steps": steps, "denoising_strength": asked}
    answer = post(api, "img2img", body)
    assert answer["parameters"] == {**body, "init_images": None, "mask": None}
    info = json.loads(answer["info"])
    assert (info["steps"], info["denoising_strength"]) == (steps, used)
    assert f"Denoising strength: {used}, " in info["infotexts"][0]
    call = {"num_inference_steps": steps, "strength": used, "seed": 7}
    assert_drawn(pipe, answer["images"], prompt="a dog", image=image, **call)


def test_a_data_url_is_a_picture(api: httpx2.Client) -> None:
    image = noise("RGB", (64, 64))
    bare = {"init_images": [sent(image)], "seed": 7, "include_init_images": True}
    url = {**bare, "init_images": [f"data:image/png;base64,{sent(image)}"]}
    answers = [post(api, "img2img", body) for body in (bare, url)]
    assert answers[0]["images"] == answers[1]["images"]
    assert [answer["parameters"] for answer in answers] == [bare, url]


def test_a_mask_s_white_is_repainted(guided_api: httpx2.Client, guided_pipe: Pipeline) -> None:
    image, mask = noise("RGB", (64, 64)), Image.new("L", (32, 32))  # of another size
    mask.paste(255, (0, 0, 16, 32))
    opaque = Image.merge("RGBA", [mask] * 3 + [Image.new("L", mask.size, 255)])
    transparent = Image.merge("RGBA", [Image.new("L", mask.size, 255)] * 3 + [mask])
    inverted = {"mask": sent(mask.point(lambda level: 255 - level)), "inpainting_mask_invert": 1}
    masks: list[dict[str, Any]] = [{"mask": sent(m)} for m in (mask, mask.convert("P"), opaque, transparent)]
    common = {"prompt": "a dog", "init_images": [sent(image)], "denoising_strength": 1, "steps": 2, "seed": 7}
    answers = [post(guided_api, "img2img", {**common, **more}) for more in [*masks, inverted]]
    assert len({answer["images"][0] for answer in answers}) == 1
    assert "mask" not in {key for key, value in answers[0]["parameters"].items() if value is not None}
    call = {"num_inference_steps": 2, "strength": 1.0, "seed": 7}
    assert_drawn(guided_pipe, answers[0]["images"], prompt="a dog", image=image, mask_image=mask, **call)


def test_the_options_choose_the_model(two_models: Serving) -> None:
    with httpx2.Client(base_url=f"{two_models.url}/sdapi/v1", timeout=60) as api:
        assert [model["title"] for model in api.get("sd-models").json()] == ["sd-fp32", "guided"]
        for name, chosen in (("guided", "guided"), ("no such", "guided"), ("sd-fp32", "sd-fp32")):
            assert api.post("options", json={"sd_model_checkpoint": name}).status_code == 200
            info = json.loads(post(api, "txt2img", {"send_images": False})["info"])
            assert info["sd_model_name"] == api.get("options").json()["sd_model_checkpoint"] == chosen


def test_errors_before_the_routes_have_a1111_s_fields(sd: Path) -> None:
    with serving(sd, ready=False, api_keys=("secret",)) as found:
        for key, status in (("wrong", 401), ("secret", 200)):
            answer = httpx2.get(f"{found.url}/sdapi/v1/options", auth=("user", key))
            assert answer.status_code == status
            assert ("detail" in answer.json()) == (status == 401)


@pytest.fixture
def told(sd: Path) -> Iterator[tuple[Told, Callable[..., None], httpx2.Client]]:
    """The source, a way to do something on the server's loop, and its API."""
    source = Told()
    with serving(sd, source=source, api_keys=("one", "two")) as found:

        def do(function: Callable[..., Any], *arguments: Any) -> None:
            done = threading.Event()
            found.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
            assert done.wait(30)

        with httpx2.Client(base_url=f"{found.url}/sdapi/v1", timeout=60, auth=("", "one")) as api:
            yield source, do, api


def asked(source: Told, api: httpx2.Client, pool: ThreadPoolExecutor, **body: Any) -> Any:
    """Ask for pictures of seed 0 and above, and return when all are asked for at the source."""
    source.asked.clear()
    answer = pool.submit(api.post, "txt2img", json={"seed": 0, "steps": 4, **body})
    until(lambda: len(source.asked) == body.get("batch_size", 1) * body.get("n_iter", 1))
    return answer


@pytest.mark.parametrize(("strength", "passes"), [(None, 4), (0.5, 2)])
def test_a_picture_counts_as_many_passes_as_it_makes(server: Serving, strength: float | None, passes: int) -> None:
    """See that the worker counts what `progress` divides by."""
    model = server.service.models.first
    image = None if strength is None else noise("RGB", (64, 64))
    made = request(model.bundle, Wanted("a cat", image=image, strength=strength, num_inference_steps=4), 0)
    jobs = [Job(model.name, replace(made, seeds=(seed,)), "a test") for seed in (1, 2)]
    drawing = Drawing("txt2img", jobs, model.bundle.open_chain(made.chain).passes(made.table))
    drawn = asyncio.run_coroutine_threadsafe(drawing.draw(server.service.source), server.loop).result(60)
    assert list(drawn) == [0, 1]
    assert [progress.done for progress in drawing.progress] == [passes] * 2 == [drawing.passes] * 2


def test_progress_is_that_of_the_client(told: tuple[Told, Callable[..., None], httpx2.Client]) -> None:
    source, do, api = told
    with ThreadPoolExecutor() as pool:
        answer = asked(source, api, pool, n_iter=2)
        seen = [api.get("progress?skip_current_image=false").json()]
        do(setattr, source.asked[0][0], "done", 3)
        seen.append(api.get("progress").json())
        do(source.asked[0][1].set_result, GREY)
        seen.append(api.get("progress").json())
        states = [progress["state"] for progress in seen]
        assert [progress["progress"] for progress in seen] == [0.0, 3 / 8, 1 / 2]
        assert [(s["job_count"], s["job_no"]) for s in states] == [(2, 0), (2, 0), (2, 1)]
        assert [(s["sampling_step"], s["sampling_steps"]) for s in states] == [(0, 4), (3, 4), (0, 4)]
        assert seen[0]["eta_relative"] == 0 and seen[1]["eta_relative"] > 0 and seen[2]["current_image"] is None
        assert len(states[0]["job_timestamp"]) == 14 and {s["interrupted"] for s in states} == {False}
        other = api.get("progress", auth=("", "two")).json()
        assert (other["progress"], other["state"]["job_count"]) == (0.0, 0)
        do(source.asked[1][1].set_result, GREY)
        assert len(answer.result().json()["images"]) == 2
    after = api.get("progress").json()
    assert (after["progress"], after["eta_relative"], after["state"]["job_count"]) == (0.0, 0.0, 0)


def test_interrupt_ends_the_client_s_own_pictures(told: tuple[Told, Callable[..., None], httpx2.Client]) -> None:
    source, do, api = told
    with ThreadPoolExecutor() as pool:
        answer = asked(source, api, pool, batch_size=3)
        do(source.asked[1][1].set_result, GREY)
        assert api.post("interrupt", auth=("", "two")).json() == {}
        assert (source.ended, answer.done()) == ([], False)
        assert api.post("interrupt").json() == {}
        found = answer.result()
        assert (found.status_code, sorted(source.ended)) == (200, [0, 2])
        info = json.loads(found.json()["info"])
        (image,) = found.json()["images"]
        assert np.asarray(picture(image)).tobytes() == GREY.picture.tobytes()
        assert (info["all_seeds"], len(info["infotexts"]), info["seed"]) == ([1], 1, 0)
        answer = asked(source, api, pool)
        assert api.post("interrupt").json() == {}
        assert (answer.result().status_code, answer.result().json()["images"]) == (200, [])


def test_a_picture_without_room_ends_the_others(told: tuple[Told, Callable[..., None], httpx2.Client]) -> None:
    source, do, api = told
    with ThreadPoolExecutor() as pool:
        answer = asked(source, api, pool, batch_size=3)
        do(source.asked[1][1].set_exception, overloaded("no room", 3))
        found = answer.result()
    assert (found.status_code, found.headers["retry-after"], found.json()["detail"]) == (503, "3", "no room")
    assert sorted(source.ended) == [0, 2]


def test_who_hangs_up_is_not_drawn_for(told: tuple[Told, Callable[..., None], httpx2.Client]) -> None:
    source, _, api = told
    with pytest.raises(httpx2.ReadTimeout):
        api.post("txt2img", json={"seed": 0, "n_iter": 2}, timeout=0.2)
    until(lambda: sorted(source.ended) == [0, 1])
    assert api.get("progress").json()["state"]["job_count"] == 0
