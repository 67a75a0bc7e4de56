"""The worker behind a real socket: the right pictures for everyone, in turn, and an answer whatever goes wrong."""

import contextlib
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from asking import GENERATE, Answer, Client, connect, draw, metric, until
from serving import Serving, serving
from small_graphs import WORDS
from standin import Error, StandIn, gpu, pipeline, standing_in

from turbochain.runtime import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.serve import listen
from turbochain.runtime.serve.pipelines import Pipelines
from turbochain.runtime.serve.source import Drawn, Job, Progress, State
from turbochain.runtime.serve.worker import Worker

ON = {"backend": "onnxruntime"}
MODEST, GREEDY, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Serving]:
    with serving(small, queue=16, **ON) as server:
        yield server


@pytest.fixture(scope="module")
def pipe(small: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small, threads=1, **ON) as pipe:  # type: ignore[arg-type]
        yield pipe


def picture(pipe: Pipeline, prompt: str, *, seed: int, **more: Any) -> np.ndarray:
    return pipe(prompt, seed=[seed], output_type="uint8", **more).images[0]


class Gate:
    """Every pass of a server's pipeline is noted, and waits here while the gate is shut."""

    def __init__(self, server: Serving, name: str = "small") -> None:
        """The pipeline itself draws, as before."""
        self.passes: list[tuple[str, ...]] = []  # their prompts
        self.before: Callable[[], None] = lambda: None  # done before each pass that is let through
        self._server, self._open = server, threading.Event()
        self._pool = ThreadPoolExecutor(32)
        source: Any = server.service.source
        self._pipe = source._pipelines._loaded[name]
        self._draw = self._pipe.draw

    def __enter__(self) -> "Gate":
        self._pipe.draw = self._pass
        self.shut_in = self.ask("shut in", address=OTHER)  # the worker has it, and the others wait in the queue
        until(lambda: bool(self.passes))
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._pool.shutdown()
        del self._pipe.draw

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

    def ask(self, prompt: str, **more: Any) -> "Future[Answer]":
        return self._pool.submit(draw, self._server.url, prompt, **{"seed": 0} | more)

    def ask_in_turn(self, prompts: Sequence[str], **more: Any) -> "list[Future[Answer]]":
        """Ask for each picture when the one before waits."""
        asked = []
        for prompt in prompts:
            before = self.waiting
            asked.append(self.ask(prompt, **more))
            until(lambda before=before: self.waiting > before)  # type: ignore[misc]
        return asked

    @property
    def waiting(self) -> int:
        return self._server.service.source.state.waiting

    def _pass(self, request: Request, **more: Any) -> Any:
        self.passes.append(request.prompts)
        self._open.wait(60)
        self.before()
        return self._draw(request, **more)


def test_1000_random_prompts_from_16_clients_are_the_pipelines_pictures(server: Serving, pipe: Pipeline) -> None:
    numbers = random.Random(1)
    calls: list[dict[str, Any]] = []
    for _ in range(1000):
        call = {"prompt": " ".join(numbers.choices(WORDS, k=numbers.randrange(6))), "seed": numbers.randrange(2**64)}
        if numbers.random() < 0.5:
            call["num_inference_steps"] = numbers.choice((2, 3))
        if numbers.random() < 0.3:
            call |= {"guidance_scale": numbers.choice((1.5, 3.0)), "negative_prompt": numbers.choice(WORDS)}
        calls.append(call)
    expected = [picture(pipe, **call) for call in calls]
    before = metric(server.url, "turbochain_pass_seconds_count")

    def client(first: int) -> list[np.ndarray]:
        client = Client(server.url)
        got = [client.draw(**call).pictures[0] for call in calls[first::16]]
        client.close()
        return got

    with ThreadPoolExecutor(16) as pool:
        for first, got in enumerate(pool.map(client, range(16))):
            np.testing.assert_array_equal(got, expected[first::16])
    assert 500 <= metric(server.url, "turbochain_pass_seconds_count") - before < 1000  # two pictures in each at most


def test_pictures_of_one_kind_are_drawn_together_and_wait_for_no_more(server: Serving, pipe: Pipeline) -> None:
    with Gate(server) as gate:
        same = gate.ask_in_turn(["one", "two"], address=GREEDY)
        other = gate.ask_in_turn(["more steps"], address=GREEDY, num_inference_steps=3)
        more = gate.ask_in_turn(["three", "four"], address=MODEST)
        gate.open()
        answers = [asked.result() for asked in (*same, *other, *more)]
    assert gate.passes == [("shut in",), ("one", "three"), ("two", "four"), ("more steps",)]
    for answer, prompt in zip(answers, ("one", "two", "more steps", "three", "four"), strict=True):
        steps = {"num_inference_steps": 3} if prompt == "more steps" else {}
        np.testing.assert_array_equal(answer.pictures[0], picture(pipe, prompt, seed=0, **steps))


def test_a_greedy_client_does_not_keep_a_modest_one_waiting(server: Serving) -> None:
    with Gate(server) as gate:
        gate.ask_in_turn([f"greedy {i}" for i in range(8)], address=GREEDY)
        gate.ask_in_turn(["modest"], address=MODEST, num_inference_steps=3)  # of a kind of its own
        gate.open()
    assert gate.passes[1:4] == [("greedy 0", "greedy 1"), ("modest",), ("greedy 2", "greedy 3")]


def test_a_bad_request_does_not_harm_its_neighbours(server: Serving, pipe: Pipeline) -> None:
    """The same scale leaves one picture as it is, as its two prompts are one, and makes another infinite."""
    scale, sound = {"guidance_scale": 3e38}, {"negative_prompt": "dog"}
    with Gate(server) as gate:
        right = gate.ask_in_turn(["dog"], address=GREEDY, **scale, **sound)
        wrong = gate.ask_in_turn(["cat"], address=MODEST, **scale, **sound)
        refused = gate.ask("dog", num_inference_steps=99, **scale, **sound).result()  # while the others wait
        gate.open()
    assert (refused.status, refused.error["param"]) == (400, "num_inference_steps")
    failed = wrong[0].result()
    assert (failed.status, failed.error["code"]) == (500, "failed") and "infinite" in failed.error["message"]
    expected = picture(pipe, "dog", seed=0, **scale, **sound)
    np.testing.assert_array_equal(right[0].result().pictures[0], expected)
    assert gate.passes[1:] == [("dog", "cat"), ("dog",), ("cat",)]
    assert draw(server.url, "a cat").status == 200


def test_a_full_queue_takes_from_the_longest(small: Path) -> None:
    with serving(small, queue=3, **ON) as server, Gate(server) as gate:
        greedy = gate.ask_in_turn(["one", "two", "three"], address=GREEDY)
        refused = gate.ask("four", address=GREEDY).result()
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        modest = gate.ask("modest", address=MODEST)
        displaced = greedy[2].result()
        assert (displaced.status, displaced.error["code"]) == (429, "overloaded")
        assert int(displaced.headers["retry-after"]) >= 1
        equal = gate.ask("one of two each", address=MODEST).result()  # two and one wait: nobody has two more
        assert equal.status == 503
        assert metric(server.url, "turbochain_waiting") == gate.waiting == 3
        too_many = gate.ask("many", n=4).result()
        assert (too_many.status, too_many.error["type"]) == (400, "invalid_request_error")
        gate.open()
        assert [asked.result().status for asked in (*greedy[:2], modest)] == [200] * 3
        assert len(draw(server.url, "as many as may wait", n=3).pictures) == 3
        refusals = {status: metric(server.url, "turbochain_answers_total", status=status) for status in ("429", "503")}
        assert refusals == {"429": 1, "503": 2}


def hang_up(url: str, body: bytes) -> Any:
    """Ask for a picture; the connection is the caller's to close."""
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    connection = connect(url)
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_who_hangs_up_gets_no_picture(server: Serving) -> None:
    """One that waits is never begun; one that is being drawn ends at the next launch."""
    gone = metric(server.url, "turbochain_answers_total", status="499")
    with Gate(server) as gate:
        pictures = metric(server.url, "turbochain_pictures_total")
        leaving = [hang_up(server.url, b'{"prompt": "leaving", "n": 4}'), hang_up(server.url, b'{"prompt": "too"}')]
        until(lambda: gate.waiting == 5)
        staying = gate.ask_in_turn(["staying"])
        for connection in leaving:
            connection.close()
        until(lambda: metric(server.url, "turbochain_answers_total", status="499") == gone + 2)
        assert gate.waiting == 1
        gate.open()
        assert staying[0].result().status == 200
    assert gate.passes == [("shut in",), ("staying",)]
    assert metric(server.url, "turbochain_pictures_total") == pictures + 2
    with Gate(server) as gate:
        drawn = metric(server.url, "turbochain_pictures_total")
        gate.open()
        gate.shut_in.result()
        gate.shut()
        connection = hang_up(server.url, b'{"prompt": "in the midst", "stream": true}')
        until(lambda: gate.passes[-1] == ("in the midst",))
        connection.close()
        until(lambda: metric(server.url, "turbochain_answers_total", status="499") == gone + 3)
        gate.open()
        assert draw(server.url, "after it").status == 200
    assert metric(server.url, "turbochain_pictures_total") == drawn + 2


def test_a_picture_has_its_time(small: Path) -> None:
    with serving(small, timeout=1.0, **ON) as server, Gate(server) as gate:
        late = gate.ask_in_turn(["late"])[0].result()
        assert (late.status, late.error["code"]) == (503, "timeout") and int(late.headers["retry-after"]) >= 1
        assert gate.shut_in.result().status == 503
        gate.open()
        assert draw(server.url, "in time").status == 200
        assert gate.passes == [("shut in",), ("in time",)]


def test_the_port_answers_while_the_model_loads(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, warm_up = threading.Event(), Pipelines.warm_up
    monkeypatch.setattr(Pipelines, "warm_up", lambda *given: loaded.wait(60) and warm_up(*given))
    with serving(small, ready=False, **ON) as server:
        client = Client(server.url)
        for answer in (client.draw("a cat"), client.draw("a cat", stream=True), client.get("/readyz")):
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert client.draw("a cat").error["code"] == "starting"
        assert client.get("/healthz").status == client.get("/v1/models").status == 200
        loaded.set()
        until(lambda: client.get("/readyz").status == 200)
        assert client.draw("a cat").status == 200


def test_several_bundles_share_what_memory_there_is(
    small: Path, sdxl: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte is enough for one bundle at a time."""
    caplog.set_level(logging.INFO, "turbochain")
    with Pipeline.load(sdxl, threads=1, **ON) as large, serving(small, sdxl, memory_bytes=1, **ON) as server:  # type: ignore[arg-type]
        worker: Any = server.service.source
        client = Client(server.url)
        names = [model["id"] for model in client.get("/v1/models").json["data"]]
        assert names == ["small", "sdxl-fp32"] and client.get("/v1/models/small").json["id"] == "small"
        for name, of in ((names[1], large), (names[0], pipe), (names[1], large)):
            answer = client.draw("a cat", model=name, seed=7)
            assert answer.json["model"] == name and [*worker._pipelines._loaded] == [name]
            np.testing.assert_array_equal(answer.pictures[0], picture(of, "a cat", seed=7))
        closed = [record.message for record in caplog.records if record.message.startswith("closing")]
        assert closed == [f"closing {names[i % 2]}, to make room for {names[1 - i % 2]}" for i in range(3)]
        unknown = client.draw("a cat", model="dall-e-2")
        assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
        five = client.draw("a cat", model=names[1], n=5, seed=2**64 - 2)  # three in each pass
        assert metric(server.url, "turbochain_pass_seconds_count", model=names[1]) == 4
        for got, seed in zip(five.pictures, (2**64 - 2, 2**64 - 1, 0, 1, 2), strict=True):
            np.testing.assert_array_equal(got, picture(large, "a cat", seed=seed))
        assert client.draw("a cat").json["model"] == "small"


def test_a_bundle_that_turns_out_to_be_damaged_harms_no_other(small: Path, tmp_path: Path) -> None:
    """It was the server's, so that its clients are told of a fault, and not of a bad request."""
    damaged = tmp_path / "damaged.bundle"
    shutil.copytree(small, damaged)
    with (damaged / "graphs/unet.onnx").open("ab") as file:
        file.write(b"x")
    with serving(small, damaged, **ON) as server:
        client = Client(server.url)
        for _ in range(2):
            answer = client.draw("a cat", model="damaged")
            assert (answer.status, answer.error["code"]) == (500, "failed") and "unet.onnx" in answer.error["message"]
            assert client.draw("a cat", model="small").status == client.get("/healthz").status == 200


def test_a_cuda_fault_is_told_to_everyone(small: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor for GPUs runs for real, over the stand-in of tests/cuda; one of its CUDA calls fails for good."""
    with standing_in() as runtime:
        monkeypatch.setattr(Pipeline, "load", lambda path, **_: pipeline(Path(path), StandIn))
        with serving(small, device="cuda") as server:
            client, worker = Client(server.url), cast(Worker, server.service.source)
            assert worker._pipelines._limit == gpu().gpu.memory_bytes // 2  # type: ignore[union-attr, operator]
            np.testing.assert_array_equal(client.draw("a cat", seed=3).pictures[0], picture(pipe, "a cat", seed=3))
            assert (client.get("/healthz").status, client.get("/readyz").status) == (200, 200)
            with Gate(server) as gate:
                scale = {"guidance_scale": 3e38}  # see above: the two fail, and each is drawn alone
                waiting = gate.ask_in_turn(["dog", "cat", "three"], negative_prompt="dog", **scale)

                def fail() -> None:
                    if gate.passes[-1] == ("dog",):
                        runtime.fail[len(runtime.calls)] = Error.cudaErrorIllegalAddress

                gate.before = fail
                gate.open()
                assert gate.shut_in.result().status == 200
                answers = [asked.result() for asked in waiting]
            assert gate.passes == [("shut in",), ("dog", "cat"), ("dog",)]
            assert [(answer.status, answer.error["code"]) for answer in answers] == [(503, "failed")] * 3
            assert all("retry-after" in answer.headers for answer in answers)
            health = client.get("/healthz")
            assert health.status == 503 and "cudaErrorIllegalAddress" in health.json["problem"]
            assert client.get("/readyz").status == client.draw("a cat").status == 503


class Ready:
    """A source whose pictures are ready: for what comes after the drawing."""

    state = State(ready=True)

    def __init__(self, picture: np.ndarray | None = None) -> None:
        self._picture = picture
        self.clients: list[str] = []  # of the jobs

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        self.clients.append(job.client)
        if self._picture is None:
            raise ZeroDivisionError("a fault of ours")
        return Drawn(self._picture, 0.0)

    async def start(self) -> None:
        """There is nothing to load."""

    async def close(self) -> None:
        """There is nothing to end."""


@pytest.mark.parametrize("keys", [(), ("one", "two")])
def test_a_client_is_its_key_or_else_its_address(keys: tuple[str, ...], small: Path) -> None:
    source = Ready()
    with serving(small, source=source, api_keys=keys) as server:
        for key, address in (("one", MODEST), ("two", MODEST), ("two", GREEDY)):
            answer = Client(server.url, key=key, address=address).draw("a cat")
            assert answer.status == 500 and "its log says where" in answer.error["message"]
    assert len(source.clients) == 3 and len(set(source.clients)) == 2
    assert (source.clients[0] == source.clients[1]) == (not keys)


def test_a_slow_reader_holds_only_itself(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that never reads keep the server from its end."""
    monkeypatch.setattr(listen, "READING", 0.1)
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    with contextlib.ExitStack() as later, serving(small, source=Ready(noise)) as server:
        asked = b'{"prompt": "", "n": 10, "output_format": "jpeg", "output_compression": 100}'  # 25 MB
        with contextlib.closing(hang_up(server.url, asked)) as slow:
            first = slow.recv(1000)
            assert first.startswith(b"HTTP/1.1 200 ")
            size = int(first.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert size > 10_000_000  # more than the socket's buffers hold
            client = Client(server.url)
            for _ in range(3):
                assert client.draw("", output_format="jpeg").status == 200
            read = len(first) - first.index(b"\r\n\r\n") - 4
            while read < size:
                read += len(slow.recv(1 << 20))
        never = later.enter_context(contextlib.closing(hang_up(server.url, asked)))
        assert never.recv(10) == b"HTTP/1.1 2"
