"""Control images in every protocol: pictures as the pipeline's, of the same control image."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from asking import Answer, Client
from PIL import Image
from serving import Serving, serving
from uploads import file
from websockets.sync.client import connect

from turbochain.runtime import Pipeline

PHOTO = Image.fromarray(cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8), (0, 0), 4))
START = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
EDGES = (20.0, 60.0)
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def served(controlled: Path) -> Iterator[Serving]:
    with serving(controlled, backend="onnxruntime") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[Client]:
    client = Client(served.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def pipe(controlled: Path) -> Iterator[Pipeline]:
    with Pipeline.load(controlled, threads=1, backend="onnxruntime") as pipe:
        yield pipe


def right(pipe: Pipeline, **call: Any) -> np.ndarray:
    return pipe("a cat", **{"num_inference_steps": 2, "seed": [7], "output_type": "uint8", **call}).images[0]


def edges(picture: Image.Image) -> np.ndarray:
    """OpenCV's, of the picture at the size that is drawn."""
    return cv2.Canny(np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS)), *EDGES)


def text(picture: Image.Image) -> str:
    return base64.b64encode(file(picture)).decode()


def opened(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_generation_follows_its_control_image(client: Client, pipe: Pipeline) -> None:
    plain = right(pipe)
    for more, call in (
        ({"controlnet": "canny"}, {"control_image": PHOTO, "controlnet": "canny"}),
        (
            {"controlnet": "canny", "controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.5},
            {
                "control_image": PHOTO,
                "controlnet": "canny",
                "controlnet_conditioning_scale": 0.5,
                "control_guidance_end": 0.5,
            },
        ),
        ({"controlnet": "canny", "canny": EDGES}, {"control_image": edges(PHOTO), "controlnet": "canny"}),
        (
            {"controlnet": "sketch", "controlnet_conditioning_scale": 0.7},  # a T2I-Adapter, by the same fields
            {"control_image": PHOTO, "t2i_adapter": "sketch", "adapter_conditioning_scale": 0.7},
        ),
    ):
        (picture,) = client.draw("a cat", **CALL, control_image=text(PHOTO), **more).pictures
        np.testing.assert_array_equal(picture, right(pipe, **call))
        assert (picture != plain).any()
    (picture,) = client.draw("a cat", **CALL, canny=EDGES).pictures  # without a picture they have no effect
    np.testing.assert_array_equal(picture, plain)


def test_an_edit_has_both_pictures(client: Client, pipe: Pipeline) -> None:
    fields = {"prompt": "a cat", "seed": "7", "num_inference_steps": "2", "strength": "0.5", "controlnet": "canny"}
    fields["canny"] = json.dumps(EDGES)
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value.encode())
        for name, value in fields.items()
    ]
    for name, picture in (("image", START), ("control_image", PHOTO)):
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n\r\n'
        parts.append(head.encode() + file(picture) + b"\r\n")
    body = b"".join(parts) + b"--x--\r\n"
    (made,) = client.ask("POST", "/v1/images/edits", body, Content_Type="multipart/form-data; boundary=x").pictures
    expected = right(pipe, image=START, strength=0.5, control_image=edges(PHOTO), controlnet="canny")
    np.testing.assert_array_equal(made, expected)


def test_the_socket_carries_one_picture_or_both(served: Serving, pipe: Pipeline) -> None:
    start, control = file(START), file(PHOTO)
    followed = {"control_image": PHOTO, "controlnet": "canny"}
    with connect(f"{served.url.replace('http', 'ws')}/ws") as socket:
        for files, more, call in (
            (control, {"control_bytes": len(control)}, followed),
            (start + control, {"control_bytes": len(control), "strength": 0.5}, followed | {"image": START}),
            (control, {"control_bytes": len(control), "canny": EDGES}, followed | {"control_image": edges(PHOTO)}),
            (start, {"strength": 0.5}, {"image": START}),  # as before there were any
        ):
            fields = {"id": 1, "prompt": "a cat", "format": "png", **CALL, "controlnet": "canny", **more}
            header = json.dumps(fields).encode()
            socket.send(len(header).to_bytes(4, "little") + header + files)
            message = socket.recv(20)
            assert isinstance(message, bytes), message
            made = np.asarray(Image.open(io.BytesIO(message[16:])))
            call = call | ({"strength": 0.5} if "image" in call else {})
            np.testing.assert_array_equal(made, right(pipe, **call))
        header = json.dumps({"id": 2, "prompt": "", "control_bytes": 9}).encode()
        socket.send(len(header).to_bytes(4, "little") + header + b"12345678")
        refused = json.loads(socket.recv(20))
        assert (refused["id"], refused["error"]["param"]) == (2, "control_bytes")


def test_a1111s_unit_is_read(client: Client, pipe: Pipeline) -> None:
    body = {"prompt": "a cat", "seed": 7, "steps": 2}
    unit = {"image": text(PHOTO), "module": "canny", "model": "canny [0123abcd]", "weight": 0.5, "guidance_end": 0.5}
    unit |= {"threshold_a": EDGES[0], "threshold_b": EDGES[1], "pixel_perfect": True, "resize_mode": "Crop and Resize"}
    followed = {"control_image": edges(PHOTO), "controlnet": "canny", "controlnet_conditioning_scale": 0.5}
    followed["control_guidance_end"] = 0.5

    def scripts(*units: Any) -> dict[str, Any]:
        return {"alwayson_scripts": {"ControlNet": {"args": units}, "ADetailer": {"args": [True]}}}

    answer = client.ask("POST", "/sdapi/v1/txt2img", body | scripts({"enabled": False}, unit)).json
    np.testing.assert_array_equal(opened(answer["images"][0]), right(pipe, **followed))
    told = json.loads(answer["info"])["extra_generation_params"]["ControlNet 0"]
    assert told.startswith("Module: canny, Model: canny, Weight: 0.5, ")
    adapter = {"image": text(PHOTO), "model": "sketch", "weight": 0.7, "guidance_start": 0.0, "guidance_end": 1.0}
    answer = client.ask("POST", "/sdapi/v1/txt2img", body | scripts(adapter)).json
    of_adapter = {"control_image": PHOTO, "t2i_adapter": "sketch", "adapter_conditioning_scale": 0.7}
    np.testing.assert_array_equal(opened(answer["images"][0]), right(pipe, **of_adapter))
    off = [{"enabled": False, "module": "depth_midas", "weight": "much"}, {"enabled": False, "module": "None"}]
    traced = {**unit, "image": text(Image.fromarray(edges(PHOTO))), "module": "None"}  # A1111's name of no preprocessor
    for units in ([*off, {**unit, "module": "Canny"}], [traced, *off]):
        answer = client.ask("POST", "/sdapi/v1/txt2img", body | scripts(*units)).json
        np.testing.assert_array_equal(opened(answer["images"][0]), right(pipe, **followed))
    edit = body | {"init_images": [text(START)], "denoising_strength": 0.5}
    answer = client.ask("POST", "/sdapi/v1/img2img", edit | scripts({"model": "canny"})).json
    followed = {"image": START, "strength": 0.5, "control_image": START, "controlnet": "canny"}
    followed["controlnet_conditioning_scale"] = 1.0  # A1111's default, and not diffusers'
    np.testing.assert_array_equal(opened(answer["images"][0]), right(pipe, **followed))
    for units, says in (
        ([unit, unit], "2 ControlNets are on"),
        ([{"module": "depth", "image": text(PHOTO)}], "module: "),
        ([{"enabled": "perhaps"}], "enabled: "),
        ([{"model": "canny"}], "has no image"),
        (["canny"], "alwayson_scripts.controlnet"),
    ):
        answer = client.ask("POST", "/sdapi/v1/txt2img", body | scripts(*units))
        assert answer.status == 400 and says in answer.error["message"], answer.body


def test_what_cannot_be_followed_is_refused(client: Client) -> None:
    def refused(answer: Answer, param: str, says: str) -> None:
        assert answer.status == 400 and answer.error["param"] == param, answer.body
        assert says in answer.error["message"], answer.error

    picture = text(PHOTO)
    refused(client.draw("", control_image="?"), "control_image", "no base64 text")
    refused(client.draw("", control_image=picture, controlnet="depth"), "controlnet", "'canny'")
    refused(client.draw("", control_image=picture, controlnet="canny", canny=[1]), "canny", "2 items")
    refused(client.draw("", control_image=picture, controlnet="canny", canny=["x", 2]), "canny", "number")
    nan = b'{"prompt": "", "controlnet": "canny", "canny": [NaN, 1], "control_image": "%s"}' % picture.encode()
    refused(client.ask("POST", "/v1/images/generations", nan, Content_Type="application/json"), "canny", "low=nan")


def test_the_page_is_told_what_there_is(client: Client) -> None:
    (model,) = client.get("/about").json["models"]
    assert model["tasks"]["text-to-image"]["controlnets"] == ["canny", "sketch"]
    assert model["tasks"]["image-to-image"]["controlnets"] == ["canny"]


def test_a_request_with_a_control_image_may_be_large(client: Client) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (800, 800, 3), np.uint8))
    assert len(text(noise)) > 2**20
    assert client.draw("a cat", control_image=text(noise), controlnet="canny").status == 200
