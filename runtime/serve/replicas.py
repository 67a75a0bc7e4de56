"""The source of an ingress: replicas of Ray Serve, with a fair queue before them."""

import asyncio
import logging
from typing import Any

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from turbochain.runtime.serve.errors import Refused, failed, in_time, overloaded, unavailable
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.queue import Queue, Waiting
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

log = logging.getLogger("turbochain")

DIED = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, TaskCancelledError)
"""What Ray raises if a replica, or the process that held its answer, has ended."""

ASK_AGAIN = 10.0
"""Seconds after which the first replica is asked for again: Ray tells a new call alone that none can be started."""


class Replicas:
    """Gives Ray at most as many jobs as all its replicas may hold; others wait here, with a turn for each client."""

    def __init__(
        self, handle: DeploymentHandle, models: Models, settings: Settings, metrics: Metrics, room: int
    ) -> None:
        """Take the replicas' handle, and how many jobs they hold if there are as many as may be."""
        self._handle, self._models, self._settings, self._metrics = handle, models, settings, metrics
        self._room = room
        self._mean = 1.0  # seconds of a pass; each new one counts a quarter
        self._queue = Queue(settings.queue, self._seconds)
        self._turns: dict[Waiting, asyncio.Future[None]] = {}
        self._given = 0  # jobs that Ray has
        self._idle = asyncio.Event()
        self._idle.set()
        self._ready = False
        self._problem: str | None = None

    @property
    def state(self) -> State:
        """Return what is known of the replicas."""
        return State(self._ready, self._problem is None, len(self._queue), self._problem)

    async def start(self) -> None:
        """Begin to wait for the first replica; if there is none, Ray starts one."""
        self._starting = asyncio.create_task(self._wait_for_one())

    async def close(self) -> None:
        """Accept no more pictures, and wait until all accepted ones are drawn."""
        self._starting.cancel()
        self._queue.close()
        await self._idle.wait()

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        """Draw one picture; see `PictureSource.draw`. Replicas tell no progress."""
        if not self._ready:
            raise unavailable("the server is loading its model; try again soon", "starting")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def refuse(error: object) -> None:  # the queue gives nothing else
            if not turn.done():
                turn.set_exception(error)  # type: ignore[arg-type]

        waiting = Waiting(job, job.model, refuse, progress or Progress())
        self._queue.put(waiting)
        self._turns[waiting] = turn
        self._idle.clear()
        try:
            self._give()
            async with in_time(self._settings.timeout, self._mean):
                await turn
                made = await self._drawn(job)
        finally:
            waiting.gone.set()
            if self._turns.pop(waiting, None) is None:
                self._given -= 1
            self._give()
            if not (self._given or self._turns):
                self._idle.set()
        self._count(job, made)
        return made

    def _give(self) -> None:
        """Let as many go on as Ray has room for."""
        while self._given < self._room and len(self._queue):
            for waiting in self._queue.take(lambda _: 1):
                self._given += 1
                self._turns.pop(waiting).set_result(None)

    async def _drawn(self, job: Job) -> Drawn:
        """Return a picture. If its replica dies it is asked for once more: equal jobs give equal pictures."""
        try:
            return await self._ask(job)
        except DIED as error:
            log.warning("a replica has died, and another draws its picture: %s", error)
        try:
            return await self._ask(job)
        except DIED as error:
            raise unavailable("two replicas have died while they drew the picture", "failed") from error

    async def _ask(self, job: Job) -> Drawn:
        try:
            made = await _answer(self._handle.draw.remote(job))
        except BackPressureError as error:
            raise overloaded("too many pictures are waiting; try again later", self._room * self._seconds()) from error
        except DeploymentUnavailableError as error:
            raise unavailable("no replica can be started; `serve status` says why", "failed") from error
        except DIED:
            raise
        except RayError as error:
            log.exception("a picture could not be drawn")
            raise failed(error) from error
        if isinstance(made, Refused):
            raise made
        return made

    async def _wait_for_one(self) -> None:
        while not self._ready:
            try:
                async with asyncio.timeout(ASK_AGAIN):
                    await _answer(self._handle.ready.remote())
                self._ready, self._problem = True, None
            except TimeoutError:
                continue
            except (RayError, DeploymentUnavailableError) as error:
                log.warning("no replica can be started: %s", error)
                self._problem = "no replica can be started; `serve status` says why"
                await asyncio.sleep(1)

    def _seconds(self) -> float:
        """Return the mean seconds after which there is room for one more, if there are as many replicas as may be."""
        return self._mean / self._room

    def _count(self, job: Job, made: Drawn) -> None:
        self._mean += (made.seconds - self._mean) / 4
        chain = self._models.exactly(job.model).bundle.open_chain(job.request.chain)
        self._metrics.passed(job.model, chain.chain.tables[job.request.table].steps, made.seconds, 1)


async def _answer(response: Any) -> Any:
    """Return what a replica answers; if the task that awaits it is cancelled, the replica's is, too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
