"""What every route needs: the models, the source of pictures, and a way to draw that ends if the client hangs up."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from turbochain.runtime.errors import InputError
from turbochain.runtime.serve.errors import of_input
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job, PictureSource

Of = TypeVar("Of")

DECODERS = ThreadPoolExecutor(2, "turbochain-decoder")
"""The threads that decode what clients upload. They are few: a small file may take 200 MB while it is decoded."""


class Gone(Exception):
    """The client has hung up: nobody reads an answer."""


@dataclass(frozen=True)
class Service:
    """The parts of one server."""

    models: Models
    source: PictureSource
    settings: Settings
    metrics: Metrics

    async def draw(self, jobs: Sequence[Job]) -> list[Drawn]:
        """Draw several pictures; if one is refused, the others are not wanted any more. Raises Refused."""
        tasks: list[asyncio.Task[Drawn]] = []
        with first_of_group():
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(self.source.draw(job)) for job in jobs]
        return [task.result() for task in tasks]


@contextmanager
def first_of_group() -> Iterator[None]:
    """Raise the first of a group's errors in place of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = group.exceptions[0]
    else:
        return
    raise error  # here it does not refer to the group, which refers to it


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, Of]) -> Of:
    """Return what `work` returns; cancel it and raise Gone if the client hangs up first.

    The body must have been read.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(http.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        await abandon([working, gone])


async def abandon(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks whose results nobody wants, and wait for their end; done ones are left."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def off_loop(function: Callable[..., Of], *arguments: Any, threads: Executor | None = None) -> Of:
    """Return what a function returns that takes milliseconds, from another thread; InputError becomes Refused."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
    except InputError as error:
        raise of_input(error) from error
