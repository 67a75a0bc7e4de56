"""The source of this process: one thread that owns the pipelines and draws for everyone."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from turbochain.runtime.errors import Cancelled, CudaFault
from turbochain.runtime.serve import batching
from turbochain.runtime.serve.errors import Refused, failed, in_time, unavailable
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.pipelines import Pipelines
from turbochain.runtime.serve.queue import Queue, Waiting
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

log = logging.getLogger("turbochain")


class Worker:
    """Draws one pass at a time, of up to the engine's batch, and never waits for more jobs to fill one."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        """Take what is served; `start` begins to load the first model."""
        self._models, self._settings, self._metrics = models, settings, metrics
        self._pipelines = Pipelines(models, settings)
        self._mean = 1.0  # seconds of a picture; each new one counts a quarter
        self._queue = Queue(settings.queue, lambda: self._mean)
        self._thread = threading.Thread(target=self._run, name="turbochain-worker", daemon=True)
        self._ready = False
        self._problem: BaseException | None = None
        self._begun, self._ended = asyncio.Event(), asyncio.Event()

    @property
    def state(self) -> State:
        """Return whether it is ready and alive, and how many pictures wait."""
        problem, ready = self._problem, self._ready and not self._queue.closed
        return State(ready, problem is None, len(self._queue), None if problem is None else str(problem))

    @property
    def warm(self) -> bool:
        """Return whether it has ever made a picture."""
        return self._ready

    async def start(self) -> None:
        """Begin to load the first model and to draw a picture with it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Draw all accepted pictures, then free the models' memory."""
        self._queue.close()
        await self._ended.wait()

    async def begun(self) -> None:
        """Wait until it has drawn its first picture, or cannot."""
        await self._begun.wait()

    async def ended(self) -> None:
        """Wait for the thread's end."""
        await self._ended.wait()

    @property
    def problem(self) -> BaseException | None:
        """Return what ended the thread; None if nothing did, or `close`."""
        return self._problem

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        """Draw one picture; see `PictureSource.draw`."""
        if self._problem is not None:
            raise unavailable(f"the server cannot draw any more: {self._problem}", "failed")
        if not self._ready:
            raise unavailable("the server is loading its model; try again soon", "starting")
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Drawn] = loop.create_future()

        def settle(made: Drawn | BaseException) -> None:
            loop.call_soon_threadsafe(_settle, result, made)

        bundle = self._models.exactly(job.model).bundle
        kind = (job.model, job.adapters, batching.kind(bundle, job.request))
        waiting = Waiting(job, kind, settle, progress or Progress())
        self._queue.put(waiting)
        try:
            async with in_time(self._settings.timeout, self._mean):
                return await result
        finally:
            waiting.gone.set()

    def _run(self) -> None:
        try:
            self._mean = self._pipelines.warm_up(self._models.first)
            self._ready = True
            self._loop.call_soon_threadsafe(self._begun.set)
            while batch := self._queue.take(self._most):
                try:
                    self._draw(batch)
                except CudaFault as fault:
                    for waiting in batch:  # those that have their picture keep it
                        waiting.settle(unavailable(f"the GPU has failed: {fault}", "failed"))
                    raise
        except BaseException as error:
            self._problem = error
            if self._ready:  # else the process ends, and says it
                log.exception("the worker ends")
            self._queue.fail(unavailable(f"the server cannot draw any more: {error}", "failed"))
        finally:
            self._pipelines.close()
            self._loop.call_soon_threadsafe(self._begun.set)
            self._loop.call_soon_threadsafe(self._ended.set)

    def _most(self, job: Job) -> int:
        return batching.most(self._models.exactly(job.model).bundle, job.request)

    def _draw(self, batch: Sequence[Waiting]) -> None:
        """Draw one pass, and give each job its picture, or what went wrong; raises CudaFault alone."""
        try:
            drawn = self._pass(batch)
        except CudaFault:
            raise
        except Cancelled:
            return  # nobody awaits them
        except Refused as refused:  # the adapters, which are those of all
            for waiting in batch:
                waiting.settle(refused)
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault
                for waiting in batch:
                    self._draw([waiting])
                return
            log.exception("a picture could not be drawn")  # its request was sound
            batch[0].settle(failed(error))
        else:
            for waiting, made in zip(batch, drawn, strict=True):
                waiting.settle(made)

    def _pass(self, batch: Sequence[Waiting]) -> list[Drawn]:
        job = batch[0].job
        pipe = self._pipelines.get(self._models.exactly(job.model), job.adapters)
        request = batching.together(pipe.bundle, [waiting.job.request for waiting in batch])
        chain = pipe.bundle.open_chain(request.chain)
        for waiting in batch:
            waiting.progress.done = 0  # it may have been begun with others

        def count(name: str, seconds: float) -> None:
            if chain.graphs[name].role == "step":
                for waiting in batch:
                    waiting.progress.done += 1

        def unwanted() -> bool:
            return all(waiting.gone.is_set() for waiting in batch)

        observe = count if pipe.device.kind == "cpu" else None  # on a GPU it would undo the one CUDA graph
        start = time.perf_counter()
        made = pipe.draw(request, observe=observe, cancel=unwanted).images
        seconds = time.perf_counter() - start
        self._mean += (seconds / len(batch) - self._mean) / 4
        steps = chain.chain.tables[request.table].steps
        self._metrics.passed(job.model, steps, seconds, len(batch))
        return [Drawn(picture, seconds) for picture in made]


def _settle(result: "asyncio.Future[Drawn]", made: Drawn | BaseException) -> None:
    if result.done():
        return
    if isinstance(made, BaseException):
        result.set_exception(made)
    else:
        result.set_result(made)
