"""A server from its first connection to its last: listening, signals, and the end."""

import asyncio
import ctypes
import gc
import os
import socket
import sys
from contextlib import suppress
from types import FrameType
from typing import Literal

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from turbochain.runtime.backends import garbage
from turbochain.runtime.errors import InputError
from turbochain.runtime.serve.app import make_app
from turbochain.runtime.serve.errors import unavailable
from turbochain.runtime.serve.guard import refuse
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.settings import IMAGE_BODY, Settings
from turbochain.runtime.serve.worker import Worker

READING = 10
"""How many seconds the server, when it ends, waits for clients that are slow to read their answers."""

HEAD_SECONDS = 10.0
"""How long a connection may take to send the head of a request; the guard sees to its body."""

TRIM_SECONDS = 20.0
"""How often free memory is given back, which takes milliseconds."""

FAILED = 5
"""How many seconds after a GPU fault it says so, before it ends and can be started again."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends it at once.

    Raises InputError if a bundle cannot be opened or the address is taken, and what has ended the worker.
    """
    _one_arena()

    async def serve() -> None:
        await Server(settings).open_and_serve(sock)

    with listening(settings) as sock:
        asyncio.run(serve())


def _one_arena() -> None:
    """Let glibc have one arena, and map what is large by itself: with an arena for each thread, pictures of many sizes
    leave holes in all of them, and the process grows for hours. Other C libraries have no such settings."""
    arena_max, trim_threshold = -8, -1  # M_ARENA_MAX, M_TRIM_THRESHOLD of malloc.h; that fixes M_MMAP_THRESHOLD too
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(arena_max, 1)
        library.mallopt(trim_threshold, 1 << 16)


async def _give_back_memory(worker: Worker) -> None:
    """Collect garbage and return free memory to the system, every `TRIM_SECONDS`, once the first picture is drawn.

    By itself Python collects all cycles only when new objects are a quarter of the old ones. What is there after the
    first picture is frozen, so that a collection looks at few objects and takes milliseconds.
    """
    await worker.begun()
    garbage.collect()
    gc.freeze()
    while True:
        await asyncio.sleep(TRIM_SECONDS)
        garbage.collect()
        with suppress(OSError, AttributeError):  # glibc alone has it
            await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)


def config(app: ASGIApp, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    """Return how uvicorn runs the application."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan=lifespan,
        server_header=False,
        http=_Protocol,
        timeout_graceful_shutdown=READING,
        ws_max_size=IMAGE_BODY,
        ws_max_queue=4,
        ws_per_message_deflate=False,  # pictures are compressed already
    )


class _Protocol(H11Protocol):
    """HTTP as uvicorn has it, without connections that are held for ever because no whole head comes."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Read on; whoever sends a byte at a time gains no time by it."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Opening:
    """The application before the bundles are open, which takes as long as their download: 503; then the real one."""

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/healthz":
            await JSONResponse({"alive": True, "problem": None})(scope, receive, send)
        else:
            await refuse(unavailable("the server is opening its model; try again soon", "starting"), scope, send)


class Server(uvicorn.Server):
    """A uvicorn server that listens before its bundles are open, and answers all accepted requests before it stops."""

    def __init__(self, settings: Settings) -> None:
        """Open nothing yet. The event loop must be running."""
        self._settings, self._stage, self._loop = settings, Opening(), asyncio.get_running_loop()
        super().__init__(config(self._stage, lifespan="off"))  # the worker is begun and closed here
        self._worker: Worker | None = None
        self._ending: asyncio.Task[None] | None = None

    async def open_and_serve(self, sock: socket.socket) -> None:
        """Serve until a signal comes or the worker ends. Raises what `Models.open` does, and what ended the worker."""
        serving = asyncio.create_task(self.serve([sock]))
        try:
            models = await asyncio.to_thread(Models.open, self._settings)
            self._worker = worker = await self._begin(models)
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {', '.join(models.by_name)} at http://{shown}:{port}", file=sys.stderr, flush=True)
            beside = [asyncio.create_task(task) for task in (self._end_with(worker), _give_back_memory(worker))]
            await serving
            for task in beside:
                task.cancel()
            await worker.close()
        finally:
            self.should_exit = True
            await serving
        if worker.problem is not None:
            raise worker.problem

    async def _begin(self, models: Models) -> Worker:
        """Let the application answer, and return the worker, which begins to load."""
        metrics = Metrics()
        worker = Worker(models, self._settings, metrics)
        self._stage.app = make_app(Service(models, worker, self._settings, metrics))
        await worker.start()
        return worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; at the second signal, at once."""
        if self._ending is not None:
            os._exit(128 + sig)  # a picture that is being drawn cannot be waited for, nor a library in the midst of it
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._ending = self._ending or asyncio.create_task(self._end())

    async def _end(self) -> None:
        """Refuse new pictures, answer those that were accepted, then close every connection."""
        if self._worker is None or not self._worker.warm:
            os._exit(0)  # nothing was accepted, and loading would take its time
        await self._worker.close()
        self.should_exit = True

    async def _end_with(self, worker: Worker) -> None:
        """End if the worker does: at once if it cannot load, or `FAILED` seconds after a fault."""
        await worker.ended()
        if worker.warm and worker.problem is not None:
            await asyncio.sleep(FAILED)
        self.should_exit = True


def listening(settings: Settings) -> socket.socket:
    """Return a socket that listens; InputError if it cannot."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        sock = socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # the address follows
        raise InputError(
            f"cannot listen at {settings.host} port {settings.port} ({reason}): give another --host or --port"
        ) from error
    # Without it a small answer waits 40 ms for the client's ACK; asyncio sets it only if a socket names its protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
