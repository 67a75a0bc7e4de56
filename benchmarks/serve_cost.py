"""The server's own cost: a picture that is ready, from a request to its answer; writes results/serve-cost-….json.

    python benchmarks/serve_cost.py demo.bundle

The server, a bare uvicorn that answers with the same bytes, and this client each run in a process of their own, over
loopback. The bundle says which requests are sound; nothing draws with it.
"""

import argparse
import asyncio
import base64
import http.client
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

import cost_tables
import machine
import result
from rows import Quantiles, Served
from turbochain.runtime.serve import listen
from turbochain.runtime.serve.app import make_app
from turbochain.runtime.serve.encoding import Encoding
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

PATH = "/v1/images/generations"
FORMAT = "jpeg"
PACKAGES = ("turbochain", "fastapi", "starlette", "uvicorn", "h11", "pydantic", "pillow")


class Ready:
    """A source whose picture is ready."""

    state = State(ready=True)

    def __init__(self, picture: np.ndarray) -> None:
        """Take the picture [H, W, 3] uint8."""
        self._picture = picture

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        """Return it."""
        return Drawn(self._picture, 0.0)

    async def start(self) -> None:
        """Do nothing: there is nothing to load."""

    async def close(self) -> None:
        """Do nothing: there is nothing to end."""


def noise(size: int) -> np.ndarray:
    """Return the picture: noise, of which a JPEG is as large as can be."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)


def serve(bundle: str, size: int, ready: Connection) -> None:
    """Serve the picture; send the port."""
    settings = Settings((bundle,), port=0)
    service = Service(Models.open(settings), Ready(noise(size)), settings, Metrics())
    _run(uvicorn.Server(listen.config(make_app(service))), settings, ready)


def echo(bundle: str, answer: bytes, ready: Connection) -> None:
    """Answer every request with these bytes, when its body has been read; send the port."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", http="h11")
    _run(uvicorn.Server(config), Settings((bundle,), port=0), ready)


def _run(server: uvicorn.Server, settings: Settings, ready: Connection) -> None:
    with listen.listening(settings) as sock:
        ready.send(sock.getsockname()[1])
        asyncio.run(server.serve([sock]))


class Client:
    """A process that serves, and a connection to it that is kept."""

    def __init__(self, target: Callable[..., None], *given: object) -> None:
        """Start the process, which is given these and a pipe for its port."""
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        self._process = spawn.Process(target=target, args=(*given, there), daemon=True)
        self._process.start()
        self._connection = http.client.HTTPConnection("127.0.0.1", here.recv())
        self._body = json.dumps({"prompt": "a cat", "seed": 0, "output_format": FORMAT})

    def ask(self) -> bytes:
        """Return the body of an answer."""
        self._connection.request("POST", PATH, self._body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body[:500]
        return body

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def measure(bundle: str, size: int, rounds: int, requests: int) -> Served:
    """Ask the server, ask the echo, encode the picture, and again."""
    encoding, picture = Encoding(FORMAT), noise(size)
    server = Client(serve, bundle, size)
    answer = server.ask()
    bare = Client(echo, bundle, answer)
    ways: dict[str, Callable[[], object]] = {
        "server": server.ask,
        "echo": bare.ask,
        "encoding": lambda: base64.b64encode(encoding.encode(picture)),
    }
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    try:
        for _ in range(20):
            for call in ways.values():
                call()
        for _ in range(rounds):
            for of in seconds.values():
                of.append([])
            for _ in range(requests):
                for way, call in ways.items():
                    start = time.perf_counter()
                    call()
                    seconds[way][-1].append(time.perf_counter() - start)
    finally:
        server.close()
        bare.close()
    medians = {way: np.median(of, axis=1) for way, of in seconds.items()}
    return Served(
        format=FORMAT,
        answer_bytes=len(answer),
        clients=1,
        rounds=rounds,
        requests=requests,
        server=_quantiles(seconds["server"]),
        echo=_quantiles(seconds["echo"]),
        encoding=_quantiles(seconds["encoding"]),
        own_seconds=tuple(map(float, medians["server"] - medians["encoding"])),
    )


def _quantiles(seconds: list[list[float]]) -> Quantiles:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Quantiles(p50, p90, p99)


def main() -> None:
    """Measure, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="any bundle: its requests are checked, and nothing is drawn")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--requests", type=int, default=60, help="of each way in a round (default 60)")
    parser.add_argument("--commit", help="if git cannot say it")
    parser.add_argument("--results", type=Path, default=result.FOLDER, help="folder of the results file")
    arguments = parser.parse_args()
    run = machine.run(known_commit=arguments.commit, packages=PACKAGES)
    row = measure(arguments.bundle, arguments.size, arguments.rounds, arguments.requests)
    size = (arguments.size, arguments.size)
    found = result.Result("serve-cost", *size, "cpu", prompt=None, seed=None, runs=(run,), served=(row,))
    path = arguments.results / machine.file_name("serve-cost", *size)
    result.write(found, path)
    print(cost_tables.served([found]), path, sep="\n")


if __name__ == "__main__":
    main()
