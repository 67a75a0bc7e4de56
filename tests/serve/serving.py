"""A real server in a thread of the test's process, at a free port."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from turbochain.runtime.serve import listen
from turbochain.runtime.serve.app import make_app
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import PictureSource
from turbochain.runtime.serve.worker import Worker


@dataclasses.dataclass(frozen=True)
class Serving:
    """A server that answers."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def serving(
    *bundles: Path, source: PictureSource | None = None, ready: bool = True, **options: Any
) -> Iterator[Serving]:
    """Serve bundles on the CPU, with the options of `Settings`; `source` in place of the worker.

    `ready`: wait until it draws.
    """
    settings = Settings(tuple(map(str, bundles)), **{"port": 0, "threads": 1, **options})
    models, metrics = Models.open(settings), Metrics()
    started: threading.Event = threading.Event()
    found: list[Serving] = []
    servers: list[uvicorn.Server] = []

    async def run() -> None:
        drawing = source or Worker(models, settings, metrics)
        service = Service(models, drawing, settings, metrics)
        with listen.listening(settings) as listening:
            server = uvicorn.Server(listen.config(make_app(service)))
            servers.append(server)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            found.append(Serving(url, service, asyncio.get_running_loop()))
            task = asyncio.create_task(server.serve([listening]))
            while not (server.started and (drawing.state.ready or not ready)) and not task.done():
                await asyncio.sleep(0.005)
            started.set()
            await task

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="serving")
    thread.start()
    assert started.wait(120)
    try:
        yield found[0]
    finally:
        servers[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()
