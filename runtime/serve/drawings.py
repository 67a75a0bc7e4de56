"""The requests of A1111's clients that are being drawn: how far they are, and how a client ends its own."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from turbochain.runtime.serve.infotext import timestamp
from turbochain.runtime.serve.service import first_of_group
from turbochain.runtime.serve.source import Drawn, Job, PictureSource, Progress


class Drawing:
    """The pictures of one request."""

    def __init__(self, name: str, jobs: Sequence[Job], passes: int) -> None:
        """Take the name of the route, the jobs of one client, and how often each goes round its loop."""
        self.name, self.jobs, self.passes = name, jobs, passes
        self.client, self.started = jobs[0].client, time.time()
        self.progress = [Progress() for _ in jobs]
        self.interrupted = False
        self._tasks: list[asyncio.Task[Drawn]] = []

    async def draw(self, source: PictureSource) -> dict[int, Drawn]:
        """Return the pictures by their index: all, or those that were ready when the client interrupted.

        If one is refused, the others are not wanted any more. Raises Refused.
        """
        with first_of_group():
            async with asyncio.TaskGroup() as group:  # which takes no notice of a task that `interrupt` cancels
                for job, progress in zip(self.jobs, self.progress, strict=True):
                    self._tasks.append(group.create_task(source.draw(job, progress)))
        return {i: task.result() for i, task in enumerate(self._tasks) if not task.cancelled()}

    def interrupt(self) -> None:
        """End the pictures that are not ready."""
        self.interrupted = True
        for task in self._tasks:
            task.cancel()

    @property
    def ready(self) -> list[bool]:
        """Return for each picture whether it is ready."""
        return [task.done() for task in self._tasks] or [False] * len(self.jobs)


class Drawings:
    """All of them. It is used on the event loop alone."""

    def __init__(self) -> None:
        """Begin with none."""
        self._all: list[Drawing] = []

    @contextmanager
    def listed(self, drawing: Drawing) -> Iterator[None]:
        """Show a request for as long as it is drawn."""
        self._all.append(drawing)
        try:
            yield
        finally:
            self._all.remove(drawing)

    def interrupt(self, client: str) -> None:
        """End a client's pictures that are drawn or wait."""
        for drawing in self._of(client):
            drawing.interrupt()

    def progress(self, client: str) -> dict[str, Any]:
        """Return A1111's answer about all requests of a client; its jobs are the pictures."""
        found = self._of(client)
        pictures = [  # of each: whether it is ready, how many steps it has made, of how many
            (ready, min(progress.done, drawing.passes), drawing.passes)
            for drawing in found
            for ready, progress in zip(drawing.ready, drawing.progress, strict=True)
        ]
        share = sum(1.0 if ready else made / of for ready, made, of in pictures) / max(1, len(pictures))
        furthest = max(((made, of) for ready, made, of in pictures if not ready), default=(0, 0))
        taken = time.time() - found[0].started if found else 0.0
        state = {
            "skipped": False,
            "interrupted": any(drawing.interrupted for drawing in found),
            "stopping_generation": False,
            "job": found[0].name if found else "",
            "job_count": len(pictures),
            "job_timestamp": timestamp(found[0].started) if found else "0",
            "job_no": sum(ready for ready, _, _ in pictures),
            "sampling_step": furthest[0],
            "sampling_steps": furthest[1],
        }
        left = taken / share - taken if share else 0.0
        more = {"current_image": None, "textinfo": None}
        return {"progress": share, "eta_relative": left, "state": state, **more}

    def _of(self, client: str) -> list[Drawing]:
        return [drawing for drawing in self._all if drawing.client == client]
