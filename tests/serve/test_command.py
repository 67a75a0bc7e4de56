"""The command `turbochain serve`: a process from its first line to its end, and what it refuses before any work."""

import argparse
import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from asking import Client, draw, metric, until
from conftest import called
from hub_cache import NAME, put
from serving import serving
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.serve import listen
from turbochain.runtime.serve.command import KEY_VARIABLE, add_arguments, settings_of
from turbochain.runtime.serve.settings import Settings

SLOW = """
import os, pathlib, sys, time
from turbochain.runtime.commands.main import main
from turbochain.runtime.errors import CudaFault
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.serve import listen
listen.FAILED = 1
draw, gate = Pipeline.draw, pathlib.Path(sys.argv[1])
def late(*given, **more):
    while not gate.exists():
        time.sleep(0.01)
    if gate.read_text() == "fault":
        raise CudaFault("an illegal address")
    return draw(*given, **more)
Pipeline.draw = late
sys.exit(main(sys.argv[2:]))
"""
"""The command, whose every picture waits until a file exists; what is in it may be "fault", which ends it sooner."""


@contextlib.contextmanager
def started(gate: Path, *arguments: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start the command at a free port; return the process, and the address that it prints."""
    line = [sys.executable, "-c", SLOW, gate, "serve", *arguments, "--port", "0", "--backend", "onnxruntime"]
    process = subprocess.Popen([*map(str, line)], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.fullmatch(r"serving small at (http://127\.0\.0\.1:\d+)\n", said)
        assert found, said + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for the end; return the exit status and what the process has said meanwhile."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_signal_ends_it_when_what_was_accepted_is_answered(small: Path, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    with started(gate, small) as (process, url), ThreadPoolExecutor() as pool:
        client = Client(url)
        early = client.draw("a cat")
        assert (early.status, early.error["code"]) == (503, "starting") and early.headers["retry-after"]
        gate.touch()
        until(lambda: client.get("/readyz").status == 200)
        gate.unlink()
        asked = [pool.submit(draw, url, f"a cat {i}", seed=i, n=2) for i in range(2)]
        asked += [pool.submit(draw, url, "a stream", seed=0, n=3, stream=True, partial_images=1, num_inference_steps=3)]
        until(lambda: metric(url, "turbochain_waiting") >= 8)  # of ten, of which one or two are being drawn
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status == 503)
        late = client.draw("late")
        assert (late.status, late.error["code"]) == (503, "ending") and late.headers["retry-after"]
        assert client.get("/healthz").status == 200 and process.poll() is None
        gate.touch()
        for i, answer in enumerate(pool.map(lambda one: one.result(), asked[:2])):
            assert answer.json["seed"] == i and len(answer.pictures) == 2
        events = re.findall(r"^event: (.*)$", asked[2].result().body.decode(), re.M)
        assert events == ["image_generation.partial_image", "image_generation.completed"] * 3
        assert ended(process) == (0, "")


def test_a_second_signal_ends_it_at_once(small: Path, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    gate.touch()
    with started(gate, small) as (process, url), ThreadPoolExecutor() as pool:
        client = Client(url)
        until(lambda: client.get("/readyz").status == 200)
        gate.unlink()
        lost = [pool.submit(draw, url, "a cat", num_inference_steps=steps) for steps in (2, 3)]
        until(lambda: metric(url, "turbochain_waiting") == 1)  # the other is being drawn
        process.send_signal(signal.SIGINT)
        until(lambda: client.get("/readyz").status == 503)
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (128 + signal.SIGTERM, "")
        assert all(isinstance(one.exception(), ConnectionError) for one in lost)


def test_a_fault_of_the_gpu_ends_it_with_a_failure_when_clients_have_been_told(small: Path, tmp_path: Path) -> None:
    """The fault is raised in place of a picture: what ends the process is the same."""
    gate = tmp_path / "open"
    gate.touch()
    with started(gate, small) as (process, url):
        client = Client(url)
        until(lambda: client.get("/readyz").status == 200)
        gate.write_text("fault")
        for _ in range(2):
            answer = client.draw("a cat")
            assert (answer.status, answer.error["code"]) == (503, "failed") and "illegal address" in str(answer.json)
        assert client.get("/healthz").status == 503
        status, said = ended(process)
    assert status == 1 and said.endswith("turbochain: error: an illegal address\n"), said


def test_a_signal_ends_it_while_it_loads(small: Path, tmp_path: Path) -> None:
    with started(tmp_path / "never", small) as (process, url):
        assert Client(url).get("/readyz").status == 503
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "")


def test_a_bundle_that_cannot_be_loaded_ends_it(small: Path, tmp_path: Path) -> None:
    """Its manifest is sound, so that the port is open before the graph is hashed."""
    bundle = tmp_path / "small.bundle"
    subprocess.run(["cp", "-r", small, bundle], check=True)
    with (bundle / "graphs/unet.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with started(tmp_path / "never", bundle) as (process, _):
        status, said = ended(process)
    assert status == 2 and re.fullmatch(r"turbochain: error: .*graphs/unet\.onnx.*\n", said), said


@pytest.mark.parametrize("sound", [True, False])
def test_the_port_is_open_while_a_bundle_is_fetched(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sound: bool
) -> None:
    """The hub's cache answers when the test says so. If what comes is no bundle, the server ends and says why."""
    gate, open_bundle, servers, ended = threading.Event(), Bundle.open, list[listen.Server](), list[BaseException]()

    def late(path: str, **more: bool) -> Bundle:
        assert gate.wait(60)
        return open_bundle(path, **more)

    monkeypatch.setattr(Bundle, "open", late)
    settings = Settings((str(small if sound else tmp_path),), port=0, threads=1, backend="onnxruntime")

    async def serve() -> None:
        servers.append(listen.Server(settings))
        await servers[0].open_and_serve(sock)

    def run() -> None:
        try:
            asyncio.run(serve())
        except InputError as error:
            ended.append(error)

    with listen.listening(settings) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread, client = threading.Thread(target=run), Client(url)
        thread.start()
        for answer in (client.get("/v1/models"), client.get("/readyz"), client.draw("a cat")):
            assert (answer.status, answer.error["code"]) == (503, "starting") and answer.headers["retry-after"] == "1"
        with pytest.raises(InvalidStatus, match="503"), connect(f"{url.replace('http', 'ws')}/ws"):
            pass
        assert client.get("/healthz").json == {"alive": True, "problem": None}
        gate.set()
        if sound:
            until(lambda: client.get("/readyz").status == 200)
            assert client.draw("a cat").status == 200
            servers[0].should_exit = True
        client.close()
        thread.join(60)
        assert not thread.is_alive()
    assert [str(tmp_path) in str(error) for error in ended] == [True] * (not sound)
    said = capsys.readouterr().err.replace("ERROR:    ASGI callable returned without completing handshake.\n", "")
    assert said == (f"serving small at {url}\n" if sound else "")  # without uvicorn's line on a refused socket


def test_what_is_refused_before_any_work(small: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, sentence in {
            ("--port", port): f"cannot listen at 127.0.0.1 port {port} (Address already in use): give another",
            ("--port", 99999): "cannot listen at 127.0.0.1 port 99999",
            ("--host", "0.0.0.0"): "--host 0.0.0.0 can be reached from other machines, and there is no key: give --api",
            ("--host", ""): "can be reached from other machines",
            ("--host", "300.0.0.1", "--insecure"): "cannot listen at 300.0.0.1",
            ("--queue", 0): "--queue 0: at least 1",
            ("--timeout", "nan"): "--timeout nan: a number of seconds above 0",
            ("--memory", 0): "--memory: a number of GiB above 0",
            ("--memory", "nan"): "--memory: a number of GiB above 0",
            ("--allow-origin", "page.example"): "--allow-origin page.example: what browsers call a page's server",
            ("--model-name", ""): "a --model-name is empty",
            ("--api-key", ""): "a key is empty",
            ("--api-key", "schlüssel"): "a key is empty, or has characters that no header carries",
            ("--api-key-file", tmp_path / "none"): "none cannot be read",
            ("--model-name", "a", "--model-name", "b"): "2 --model-name for 1 bundles",
            (small, "--port", 0): "two bundles are named small: give each its own with --model-name",
            (tmp_path, "--port", 0): "bundle.json",
        }.items():
            done = called("turbochain", "serve", small, *arguments)
            assert (done.returncode, done.stdout) == (2, ""), arguments
            assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_keys_come_from_the_line_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("third\n\n  fourth  \n")
    monkeypatch.setenv(KEY_VARIABLE, " second\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = ["x.bundle", "--host", "0.0.0.0", "--api-key", "first", "--api-key-file", str(file)]
    assert settings_of(parser.parse_args(line)).api_keys == ("first", "second", "third", "fourth")
    monkeypatch.delenv(KEY_VARIABLE)
    assert settings_of(parser.parse_args([*line[:3], "--insecure"])).api_keys == ()
    file.write_text("\n")
    assert "has no key" in called("turbochain", "serve", "x.bundle", "--api-key-file", file).stderr


def test_a_bundle_on_the_hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    put(small, tmp_path)
    with (
        serving(Path(NAME), trust_engines=True, backend="onnxruntime") as server,
        Pipeline.load(small, threads=1, backend="onnxruntime") as pipe,
    ):
        client = Client(server.url)
        assert client.get("/v1/models").json["data"][0]["id"] == NAME
        assert client.get(f"/v1/models/{NAME}").json["id"] == NAME
        answer = client.draw("a cat", seed=5, model="gpt-image-1")
        assert answer.json["model"] == NAME
        expected = pipe("a cat", seed=[5], output_type="uint8").images[0]
        np.testing.assert_array_equal(answer.pictures[0], expected)


WITHOUT = """
import contextlib, io, sys
SERVER = {"fastapi", "starlette", "uvicorn", "websockets", "python_multipart", "prometheus_client", "pydantic", "anyio"}
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in SERVER else self.finder.find_spec(name, *more)
sys.meta_path[:] = map(Without, sys.meta_path)
from turbochain.runtime.commands.main import main
bundle, picture = sys.argv[1:]
assert main(["generate", bundle, "a cat", "-o", picture, "--backend", "onnxruntime"]) == 0
for words in (["--help"], ["serve", "--help"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words)
assert not {name.partition(".")[0] for name in sys.modules} & (SERVER | {"asyncio", "http"})
sys.exit(main(["serve", bundle]))
"""


def test_without_the_extra_all_else_works(small: Path, tmp_path: Path) -> None:
    """As if the server's packages were not installed; nothing else even asks for them."""
    line = [sys.executable, "-c", WITHOUT, small, tmp_path / "cat.png"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=60)
    sentence = "turbochain: error: the server's packages are not installed: pip install 'turbochain[serve]'\n"
    assert (done.returncode, done.stderr) == (2, sentence) and (tmp_path / "cat.png").exists()
