"""The WebSocket, used by a real client: its pictures are the pipeline's, and nothing that a client sends ends it."""

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Serving, serving
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from turbochain.runtime import Pipeline
from turbochain.runtime.serve import live
from turbochain.runtime.serve.encoding import Encoding
from turbochain.runtime.serve.errors import unavailable
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


class Held:
    """A source whose pictures are ready when the test says so; it remembers what was asked of it."""

    state = State(ready=True)

    def __init__(self) -> None:
        self.asked: list[Job] = []
        self.ended: list[Job] = []
        self.changed = threading.Condition()
        self.free = False
        self.picture = NOISE

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        with self.changed:
            self.asked.append(job)
            self.changed.notify_all()
        try:
            while not self.free:
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            with self.changed:
                self.ended.append(job)
                self.changed.notify_all()
            raise
        return Drawn(self.picture, 0.25)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def wait(self, asked: int = 0, ended: int = 0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= asked and len(self.ended) >= ended, 20)

    @property
    def prompts(self) -> list[str]:
        return [job.request.prompts[0] for job in self.asked]


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd, threads=1) as pipe:
        yield pipe


@pytest.fixture
def held(sd: Path) -> Iterator[tuple[Held, ClientConnection, Serving]]:
    source = Held()
    with serving(sd, source=source) as served, socket_of(served) as socket:
        yield source, socket, served


@contextlib.contextmanager
def socket_of(served: Serving, **options: Any) -> Iterator[ClientConnection]:
    with connect(f"{served.url.replace('http', 'ws')}/ws", **options) as socket:
        yield socket


def frame(image: bytes, **fields: Any) -> bytes:
    header = json.dumps(fields).encode()
    return len(header).to_bytes(4, "little") + header + image


def answer(socket: ClientConnection) -> tuple[int, int, float, float, bytes]:
    message = socket.recv(20)
    assert isinstance(message, bytes), message
    return *live.HEAD.unpack_from(message), message[16:]  # type: ignore[return-value]


def drawn(socket: ClientConnection) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(answer(socket)[4])))


def photo(format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).resize((64, 64)).save(file, format)
    return file.getvalue()


def ask(socket: ClientConnection, id: int, **fields: Any) -> None:
    socket.send(json.dumps({"id": id, "prompt": "a cat", **fields}))


def test_pictures_are_the_pipelines(server: Serving, pipe: Pipeline) -> None:
    with socket_of(server) as socket:
        ask(socket, 2**32 - 1, seed=2**64 - 1, num_inference_steps=2, format="png")
        right = pipe("a cat", seed=[2**64 - 1], num_inference_steps=2, output_type="uint8").images[0]
        id, skipped, ms_drawn, ms_encoded, file = answer(socket)
        assert (id, skipped) == (2**32 - 1, 0)
        assert ms_drawn > 0 and ms_encoded > 0
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), right)
        for more, expected in (({}, Encoding("jpeg")), ({"format": "webp", "quality": 30}, Encoding("webp", 30))):
            ask(socket, 1, seed=2**64 - 1, num_inference_steps=2, **more)
            assert answer(socket)[4] == expected.encode(right)


def test_strict_sizes(sd: Path) -> None:
    source = Held()
    source.free = True
    with serving(sd, source=source, strict_size=True) as served, socket_of(served) as socket:
        ask(socket, 1, size="512x512")
        refused = json.loads(socket.recv(20))
        assert (refused["id"], refused["error"]["param"], source.asked) == (1, "size", [])
        ask(socket, 2, size="64x64")
        assert answer(socket)[0] == 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_frame_is_drawn_from_its_picture(server: Serving, pipe: Pipeline, format: str) -> None:
    image = Image.open(io.BytesIO(photo(format)))
    right = pipe("a cat", seed=[3], image=image, strength=0.5, num_inference_steps=2, output_type="uint8").images[0]
    with socket_of(server) as socket:
        for more in ({}, {"strength": 0.5}, {"strength": 0.5, "num_inference_steps": 2}):  # the first two: the defaults
            socket.send(frame(photo(format), id=1, prompt="a cat", seed=3, format="png", **more))
            np.testing.assert_array_equal(drawn(socket), right)


def test_of_many_messages_the_newest_is_answered(server: Serving, pipe: Pipeline) -> None:
    count, ids, skipped = 30, [], 0
    with socket_of(server) as socket:
        for i in range(count):
            ask(socket, i, prompt=f"cat {i}", format="png")
        while not ids or ids[-1] != count - 1:
            id, more, _, _, file = answer(socket)
            ids.append(id)
            skipped += more
    assert ids == sorted(ids)
    assert skipped + len(ids) == count
    right = pipe(f"cat {count - 1}", seed=[0], output_type="uint8").images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), right)


def test_a_newer_message_ends_what_is_drawn(held: tuple[Held, ClientConnection, Serving]) -> None:
    source, socket, served = held
    for i, prompt in enumerate(("one", "two", "three")):
        ask(socket, i, prompt=prompt)
        source.wait(asked=i + 1)
    source.wait(ended=2)
    source.free = True
    assert answer(socket)[:3] == (2, 2, 250)
    assert b"turbochain_skipped_total 2.0" in served.service.metrics.text(0)


def test_one_picture_is_decoded_at_a_time(
    held: tuple[Held, ClientConnection, Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast frames come that end each other: a thread that decodes cannot be ended."""
    source, socket, _ = held
    source.free = True
    decoded, gate, decode = list[str](), threading.Event(), live.decode

    def waits(*given: Any) -> Any:
        decoded.append("begun")
        assert gate.wait(20)
        return decode(*given)

    monkeypatch.setattr(live, "decode", waits)
    for id in range(5):
        socket.send(frame(photo(), id=id, prompt=f"cat {id}"))
        socket.send("{")
        socket.recv(20)  # the answer to this: the frame was read
    gate.set()
    assert answer(socket)[:2] == (4, 4)
    assert source.prompts == ["cat 4"] and len(decoded) == 2  # the first frame's, and the newest's


def test_a_frame_ends_no_frame_but_of_other_settings(held: tuple[Held, ClientConnection, Serving]) -> None:
    source, socket, _ = held
    for id in range(3):
        socket.send(frame(photo(), id=id, prompt="one"))
    socket.send("{")
    socket.recv(20)  # the answer to this: the frames were read
    source.wait(asked=1)
    assert source.ended == []
    socket.send(frame(photo(), id=3, prompt="two"))
    source.wait(asked=2, ended=1)
    source.free = True
    assert answer(socket)[:2] == (3, 3)


def test_hanging_up_ends_what_is_drawn(held: tuple[Held, ClientConnection, Serving]) -> None:
    source, socket, _ = held
    ask(socket, 1)
    source.wait(asked=1)
    socket.close()
    source.wait(ended=1)


GOOD: dict[str, Any] = {"id": 7, "prompt": "a cat"}
MALFORMED: dict[str, tuple[str | bytes, int | None, str]] = {
    "no JSON": ("{", None, "JSON"),
    "a list": ("[1]", None, "object"),
    "deeply nested": ("[" * 100_000, None, "JSON"),
    "no prompt": ('{"id": 7}', 7, "prompt"),
    "no id": ('{"prompt": "a"}', None, "id"),
    "id too large": (json.dumps(GOOD | {"id": 2**32}), None, "id"),
    "id is true": (json.dumps(GOOD | {"id": True}), None, "id"),
    "prompt is a number": (json.dumps(GOOD | {"prompt": 3}), 7, "prompt"),
    "a lone surrogate": ('{"id": 7, "prompt": "\\ud800"}', None, ""),
    "a NUL": (json.dumps(GOOD | {"prompt": "a\0"}), 7, "NUL"),
    "a long prompt": (json.dumps(GOOD | {"prompt": "a" * 40_000}), 7, "32 KiB"),
    "seed": (json.dumps(GOOD | {"seed": -1}), 7, "seed"),
    "seed too large": (json.dumps(GOOD | {"seed": 2**64}), 7, "seed"),
    "steps": (json.dumps(GOOD | {"num_inference_steps": "2"}), 7, "num_inference_steps"),
    "steps not built": (json.dumps(GOOD | {"num_inference_steps": 77}), 7, "77"),
    "strength": (json.dumps(GOOD | {"strength": 0.5}), 7, "no image"),
    "NaN": ('{"id": 7, "prompt": "a", "guidance_scale": NaN}', 7, "guidance_scale"),
    "format": (json.dumps(GOOD | {"format": "svg"}), 7, "format"),
    "quality": (json.dumps(GOOD | {"quality": 101}), 7, "quality"),
    "size": (json.dumps(GOOD | {"size": "big"}), 7, "size"),
    "an unknown field": (json.dumps(GOOD | {"steps": 2}), 7, "steps"),
    "too large": (json.dumps(GOOD | {"prompt": "a" * 2**20}), None, "1 MiB"),
    "an empty frame": (b"", None, "length"),
    "a frame cut off": (b"\xff\xff\xff\xff{}", None, "length"),
    "a frame's header is no UTF-8": (b"\x02\0\0\0\xff\xfe", None, "JSON"),
    "a frame without a picture": (frame(b"", **GOOD), 7, "image"),
    "a damaged picture": (frame(photo()[:100], **GOOD), 7, "image"),
    "another file": (frame(b"GIF89a" + bytes(64), **GOOD), 7, "image"),
    "a strength without a step": (frame(photo(), **GOOD, strength=0.01), 7, "strength"),
}


def test_a_malformed_message_is_answered_and_a_good_one_after_it(held: tuple[Held, ClientConnection, Serving]) -> None:
    source, socket, _ = held
    source.free = True
    for name, (message, id, expected) in MALFORMED.items():
        socket.send(message)
        found = json.loads(socket.recv(20))
        assert found["id"] == id, name
        assert expected in found["error"]["message"], (name, found)
        assert found["error"]["type"] == "invalid_request_error", name
        ask(socket, 8)
        assert answer(socket)[0] == 8, name


@pytest.mark.parametrize(
    ("text", "message", "codes"), [(True, b"\xff", {1007}), (False, bytes(21 * 2**20), {1009, 1006})]
)
def test_what_breaks_the_protocol_closes_this_socket_alone(
    held: tuple[Held, ClientConnection, Serving], text: bool, message: bytes, codes: set[int]
) -> None:
    source, other, served = held
    source.free = True
    with socket_of(served) as socket, pytest.raises(ConnectionClosedError):
        socket.send(message, text=text)
        socket.recv(20)
    assert socket.close_code in codes  # 1006: the rest of the message met a closed socket
    ask(other, 1)
    assert answer(other)[0] == 1


def test_refusals_leave_the_socket_open(sd: Path) -> None:
    class Refusing(Held):
        async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
            self.asked.append(job)
            if len(self.asked) == 1:
                raise unavailable("the server is loading its model", "starting")
            if len(self.asked) == 2:
                raise RuntimeError("a fault of the source")
            return Drawn(NOISE, 0.1)

    with serving(sd, source=Refusing()) as served, socket_of(served) as socket:
        for id, code in ((1, "starting"), (2, "failed")):
            ask(socket, id)
            found = json.loads(socket.recv(20))
            assert (found["id"], found["error"]["code"]) == (id, code)
        ask(socket, 3)
        assert answer(socket)[0] == 3


def test_a_slow_reader_holds_only_itself_up(sd: Path) -> None:
    source, count = Held(), 150
    source.free, source.picture = True, np.tile(NOISE, (4, 4, 1))
    with serving(sd, source=source) as served, socket_of(served, max_queue=1) as slow, socket_of(served) as other:
        for id in range(count):  # 160 kB each: together more than the system's buffers hold
            ask(slow, id, quality=100)
            ask(other, id, quality=100)
            assert answer(other)[0] == id
        ids, skipped = [], 0
        while not ids or ids[-1] != count - 1:
            id, more, *_ = answer(slow)
            ids.append(id)
            skipped += more
    assert ids == sorted(ids)
    assert skipped > 0
    assert skipped + len(ids) == count


def test_a_page_of_another_server_is_refused(server: Serving) -> None:
    with pytest.raises(InvalidStatus) as refused, socket_of(server, origin="http://example.com"):
        pass
    assert refused.value.response.status_code == 403
    with socket_of(server, origin=server.url) as socket:  # type: ignore[arg-type]
        ask(socket, 1)
        assert answer(socket)[0] == 1


def test_a_browser_gives_its_key_as_a_subprotocol(sd: Path) -> None:
    source = Held()
    source.free = True
    with serving(sd, source=source, api_keys=("s3cret/+key",)) as served:
        for protocols in (None, ["turbochain"], ["turbochain", "key.d3Jvbmc"]):
            with pytest.raises(InvalidStatus) as refused, socket_of(served, subprotocols=protocols):
                pass
            assert refused.value.response.status_code == 401
        key = base64.urlsafe_b64encode(b"s3cret/+key").decode().rstrip("=")
        with socket_of(served, subprotocols=["turbochain", f"key.{key}"]) as socket:
            assert socket.subprotocol == "turbochain"
            ask(socket, 1)
            assert answer(socket)[0] == 1
        assert source.asked[0].client == "key 0"
