"""The queue before the worker: bounded, with a turn for each client."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from turbochain.runtime.serve.errors import overloaded, unavailable
from turbochain.runtime.serve.source import Drawn, Job, Progress

Settle = Callable[[Drawn | BaseException], None]
"""Gives a job's result to whoever awaits it; any thread may call it, and more than once."""


@dataclass(eq=False)
class Waiting:
    """A job in the queue, or being drawn."""

    job: Job
    kind: Hashable  # jobs of one kind can be drawn in one pass
    settle: Settle
    progress: Progress
    gone: threading.Event = field(default_factory=threading.Event)  # nobody awaits it any more


class Queue:
    """Jobs by client. Safe from several threads.

    If it is full, a client with fewer waiting jobs than another takes the place of that one's newest job: a greedy
    client cannot shut the others out.
    """

    def __init__(self, room: int, seconds: Callable[[], float]) -> None:
        """Take the number of jobs that may wait, and the mean seconds of a picture, to say when to come again."""
        self._room, self._seconds = room, seconds
        self._clients: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """Return how many wait and are still wanted."""
        with self._changed:
            self._drop_unwanted()
            return sum(map(len, self._clients.values()))

    @property
    def closed(self) -> bool:
        """Return whether nothing more is accepted."""
        return self._closed

    def put(self, waiting: Waiting) -> None:
        """Add a job; raises Refused if there is no room for its client."""
        with self._changed:
            if self._closed:
                raise unavailable("the server is ending; try again later", "ending")
            self._drop_unwanted()
            count = sum(map(len, self._clients.values()))
            if count >= self._room:
                self._make_room(waiting.job.client, count)
            self._clients.setdefault(waiting.job.client, deque()).append(waiting)
            self._changed.notify()

    def take(self, most: Callable[[Job], int]) -> list[Waiting]:
        """Wait for jobs, and return the next pass: at least one and at most `most`, all of one kind.

        The first is that of the client whose turn it is; others of its kind follow, again a client after another. An
        empty list means that the queue is closed and empty.
        """
        with self._changed:
            while True:
                self._drop_unwanted()
                if self._clients:
                    break
                if self._closed:
                    return []
                self._changed.wait()
            first = self._take_first(next(iter(self._clients)))
            taken, room = [first], most(first.job) - 1
            while room and (more := next(self._of_kind(first.kind), None)):
                taken.append(more)
                room -= 1
            return taken

    def close(self) -> None:
        """Accept nothing more; what waits is still taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Close, and give every job this error."""
        self.close()
        with self._changed:
            for jobs in self._clients.values():
                for waiting in jobs:
                    waiting.settle(error)
            self._clients.clear()

    def _take_first(self, client: str) -> Waiting:
        """Return a client's oldest job; the client goes to the end of the line."""
        jobs = self._clients.pop(client)
        found = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return found

    def _of_kind(self, kind: Hashable) -> Iterator[Waiting]:
        for client, jobs in list(self._clients.items()):
            if jobs[0].kind == kind:
                yield self._take_first(client)

    def _make_room(self, client: str, count: int) -> None:
        """Take the newest job of the client with the most, if it has two more than this one; else raise Refused."""
        seconds = count * self._seconds()
        greediest = max(self._clients, key=lambda name: len(self._clients[name]))
        own = len(self._clients.get(client, ()))
        if len(self._clients[greediest]) < own + 2:
            raise overloaded(f"{count} pictures are waiting, which is all that may; try again later", seconds)
        message = "many of your pictures are waiting, and another client had fewer; try again later"
        self._clients[greediest].pop().settle(overloaded(message, seconds, status=429))

    def _drop_unwanted(self) -> None:
        for client in list(self._clients):
            jobs = deque(w for w in self._clients[client] if not w.gone.is_set())
            if jobs:
                self._clients[client] = jobs
            else:
                del self._clients[client]
