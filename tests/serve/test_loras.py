"""LoRA files that requests name, in every protocol: pictures as the pipeline's, with the same adapters."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from asking import Answer, Client, until
from PIL import Image
from serving import Serving, serving
from test_lora_slots import draw
from test_serve_worker import Gate
from websockets.sync.client import connect

from turbochain.runtime import InputError, Pipeline
from turbochain.runtime.serve import adapters
from turbochain.runtime.serve.adapters import AdapterFolder, PipelineAdapters

NAMES = ("a", "b", "wide")
Chosen = list[tuple[str, float]]


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b, of rank 4 and 3; wide, which no slot holds; and what is no LoRA."""
    folder = tmp_path_factory.mktemp("loras")
    for name, ranks in zip(NAMES, ((4,), (3,), (64,)), strict=True):
        drawn = draw(checkpoints["sd"], seed=ord(name[0]), ranks=ranks)
        lora_files.write(folder / f"{name}.safetensors", drawn, "kohya")
    (folder / "notes.txt").write_text("not a LoRA")
    (folder / "b2.safetensors").symlink_to("b.safetensors")  # a link within the folder
    return folder


@pytest.fixture(scope="module")
def served(slotted: Path, folder: Path) -> Iterator[Serving]:
    with serving(slotted, lora_dir=str(folder), backend="onnxruntime") as found:
        yield found


@pytest.fixture
def client(served: Serving) -> Iterator[Client]:
    client = Client(served.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def pipe(slotted: Path, folder: Path) -> Iterator[Pipeline]:
    with Pipeline.load(slotted, threads=1, backend="onnxruntime") as pipe:
        for name in ("a", "b"):
            pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
        yield pipe


def right(pipe: Pipeline, chosen: Chosen, prompt: str = "a cat", **call: Any) -> np.ndarray:
    pipe.set_adapters([name for name, _ in chosen], [scale for _, scale in chosen])
    return pipe(prompt, seed=[7], output_type="uint8", **call).images[0]


def opened(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def sent(chosen: Chosen) -> list[dict[str, Any]]:
    return [{"name": name, "scale": scale} for name, scale in chosen]


def test_pictures_have_the_adapters_that_their_request_names(client: Client, pipe: Pipeline) -> None:
    """Without, with one, with both, with one again, without again: nothing of a request stays for the next."""
    drawn = []
    for chosen in ([], [("a", 0.8)], [("a", 0.5), ("b", -0.7)], [("a", 0.8)], []):
        (picture,) = client.draw("a cat", seed=7, loras=sent(chosen)).pictures
        np.testing.assert_array_equal(picture, right(pipe, chosen))
        drawn.append(picture)
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()
    (picture,) = client.draw("a cat", seed=7, loras=[{"name": "b"}, {"name": "a", "scale": 0}]).pictures
    np.testing.assert_array_equal(picture, right(pipe, [("b", 1.0)]))  # 1 by default; with 0 it is not there
    (picture,) = client.draw("a cat", seed=7, loras=sent([("b", 0.25), ("b2", 0.0), ("b", 0.75)])).pictures
    np.testing.assert_array_equal(picture, right(pipe, [("b", 1.0)]))


def test_an_edits_form_has_them_as_json(sd: Path, reference_lora: Path, folder: Path, tmp_path: Path) -> None:
    """The bundle has no slots, so that the adapter is added to the weights."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    fields = {"prompt": "a cat", "seed": "7", "strength": "0.5", "loras": json.dumps(sent([("ink", 2.0)]))}
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{value}\r\n'.encode() for n, value in fields.items()
    ]
    last = b'--x\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(parts) + last + file.getvalue() + b"\r\n--x--\r\n"
    shutil.copy(reference_lora, tmp_path / "ink.safetensors")
    shutil.copy(folder / "a.safetensors", tmp_path / "of_tables.safetensors")
    with serving(sd, lora_dir=str(tmp_path), backend="onnxruntime") as served:
        client = Client(served.url)
        answer = client.ask("POST", "/v1/images/edits", body, Content_Type="multipart/form-data; boundary=x")
        refused = client.draw("a cat", loras=[{"name": "of_tables"}])
        client.close()
    assert refused.status == 400 and refused.error["message"].startswith("of_tables.safetensors changes "), refused.body
    assert str(tmp_path) not in refused.error["message"]  # clients do not learn where the files lie
    (picture,) = answer.pictures
    with Pipeline.load(sd, threads=1, backend="onnxruntime") as pipe:
        pipe.load_lora_weights(reference_lora, adapter_name="ink")
        expected = right(pipe, [("ink", 2.0)], image=image, strength=0.5, num_inference_steps=2)
    np.testing.assert_array_equal(picture, expected)
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["data"][0]["b64_json"]))).info["loras"] == "ink: 2"


def test_the_socket_takes_them(served: Serving, pipe: Pipeline) -> None:
    with connect(f"{served.url.replace('http', 'ws')}/ws") as socket:
        body = {"id": 1, "prompt": "a cat", "seed": 7, "format": "png"}
        for chosen in ([("a", 0.8)], []):
            socket.send(json.dumps(body | {"loras": sent(chosen)}))
            message = socket.recv(20)
            assert isinstance(message, bytes), message
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(message[16:]))), right(pipe, chosen))
        socket.send(json.dumps(body | {"loras": [{"name": "c"}]}))
        refused = json.loads(socket.recv(20))
        assert (refused["id"], refused["error"]["param"]) == (1, "loras")


def test_a_prompt_of_a1111_names_them(client: Client, pipe: Pipeline) -> None:
    assert client.get("/about").json["loras"] == ["a", "b", "b2", "wide"]  # the page
    listed = client.get("/sdapi/v1/loras").json
    assert [(one["name"], one["path"]) for one in listed] == [(n, f"{n}.safetensors") for n in ("a", "b", "b2", "wide")]
    for prompt, drawn, chosen in (
        ("a cat<lora:a:0.8>", "a cat", [("a", 0.8)]),
        ("<lora:b>a <lora:a:-0.5>cat", "a cat", [("a", -0.5), ("b", 1.0)]),
        ("a cat <lora:a:0>", "a cat ", []),
    ):
        answer = client.ask("POST", "/sdapi/v1/txt2img", {"prompt": prompt, "seed": 7, "steps": 1}).json
        np.testing.assert_array_equal(opened(answer["images"][0]), right(pipe, chosen, drawn))
        info = json.loads(answer["info"])
        assert info["prompt"] == prompt and info["infotexts"][0].startswith(f"{prompt}\n")


def test_what_cannot_be_added_is_refused(client: Client, pipe: Pipeline) -> None:
    def refused(answer: Answer, *says: str) -> None:
        assert answer.status == 400, answer.body
        assert all(part in answer.error["message"] for part in says), answer.error

    refused(client.draw("a cat", loras=[{"name": "c"}]), "there is no LoRA 'c'", "choose from a, b, b2, wide")
    refused(client.draw("a cat", loras=[{"name": "../a"}]), "there is no LoRA '../a'")
    refused(client.draw("a cat", loras=[{"name": "a", "scale": True}]), "a number was expected")
    refused(client.draw("a cat", loras=[{"name": "a", "strength": 1}]), "loras.0.strength")
    refused(client.draw("a cat", loras=[{"name": "a", "scale": 1e308}] * 2), "the scale of a is inf")
    for prompt in ("<lora:a:0.8:0.5>", "<lora:a:much>", "<lora:a:te=0.5>"):
        refused(client.ask("POST", "/sdapi/v1/txt2img", {"prompt": prompt}), f"prompt: {prompt}", "<lora:a:0.8>")
    refused(client.draw("a cat", loras=[{"name": "wide"}]), "--lora-rank 64")  # the worker knows
    (picture,) = client.draw("a cat", seed=7, loras=sent([("a", 0.8)])).pictures
    np.testing.assert_array_equal(picture, right(pipe, [("a", 0.8)]))


def test_one_pass_has_one_set_of_adapters(small: Path, folder: Path) -> None:
    """The bundle draws two in a pass, and has no slots: what it is told of adapters is noted here in place of them."""
    told: list[Any] = []
    with serving(small, lora_dir=str(folder), backend="onnxruntime") as served:
        source: Any = served.service.source
        pipe = source._pipelines._loaded["small"]
        pipe.load_lora_weights = lambda path, adapter_name: told.append(path.name)
        pipe.set_adapters = lambda names, scales: told.append((names, scales))
        with Gate(served) as gate:
            a, b = sent([("a", 1.0)]), sent([("b", 0.5)])
            for i, loras in enumerate((a, b, [], a, [])):  # the second is drawn alone
                gate.ask_in_turn([f"{loras}"], loras=loras, address=f"127.0.0.{4 + i}")
            asked = len(gate.passes)
            gate.open()
            until(lambda: len(gate.passes) == asked + 3)
            assert gate.passes[asked:] == [(f"{a}",) * 2, (f"{b}",), ("[]",) * 2]
        assert told == ["a.safetensors", (["a"], [1.0]), "b.safetensors", (["b"], [0.5]), ([], [])]


def test_a_server_without_such_requests_loads_none(slotted: Path, folder: Path) -> None:
    with serving(slotted, lora_dir=str(folder), backend="onnxruntime") as served:
        client = Client(served.url)
        client.draw("a cat").pictures  # noqa: B018
        source: Any = served.service.source
        (pipe,) = source._pipelines._loaded.values()
        assert pipe.get_list_adapters() == {}
        assert client.draw("a cat", loras=[{"name": "c"}]).status == 400
        assert pipe.get_list_adapters() == {}
        client.close()


def test_those_used_last_stay(slotted: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(pipe: Pipeline) -> set[str]:
        return {name for of in pipe.get_list_adapters().values() for name in of}

    with Pipeline.load(slotted, threads=1, backend="onnxruntime") as pipe:
        loaded = PipelineAdapters(AdapterFolder.open(str(folder)), pipe)
        sizes = {name: (folder / f"{name}.safetensors").stat().st_size for name in ("a", "b")}
        monkeypatch.setattr(adapters, "LOADED_BYTES", sizes["a"] + sizes["b"])
        for name in ("a", "b", "a", "b2"):
            loaded.use(((name, 1.0),))
        assert names(pipe) == {"a", "b2"} and pipe.get_active_adapters() == ["b2"]
        loaded.use(())
        assert names(pipe) == {"a", "b2"} and pipe.get_active_adapters() == []
        with pytest.raises(InputError):
            loaded.use((("a", 1.0), ("wide", 1.0)))
        loaded.use((("b2", 0.5),))
        assert pipe.get_active_adapters() == ["b2"]
        monkeypatch.setattr(adapters, "LOADED_BYTES", 1)
        loaded.use((("a", 1.0), ("b2", 1.0)))  # what is drawn with stays, whatever it weighs
        assert names(pipe) == {"a", "b2"}


def test_the_folder_is_checked_at_the_start(folder: Path, tmp_path: Path) -> None:
    assert not AdapterFolder.open(None).by_name
    with pytest.raises(InputError, match="is no folder"):
        AdapterFolder.open(str(folder / "a.safetensors"))
    shutil.copytree(folder, tmp_path / "loras", symlinks=True)
    (tmp_path / "loras" / "out.safetensors").symlink_to(folder / "a.safetensors")
    with pytest.raises(InputError, match=r"out\.safetensors is a link that leads out of the folder"):
        AdapterFolder.open(str(tmp_path / "loras"))
