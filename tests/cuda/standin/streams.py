"""Streams, events and the order in which a GPU does what is on them: any that they allow, by a random number."""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Span = tuple[int, int]  # address, bytes


@dataclass(frozen=True, eq=False)
class Task:
    """One kernel or copy."""

    run: Callable[[], None]
    uses: tuple[Span, ...]  # the memory that it reads or writes
    owner: object = None  # the module whose code it is


@dataclass(eq=False)
class Event:
    """An event; each record of it is a new version."""

    device: int
    timing: bool
    recorded: int = 0  # the version that was put on a stream last
    done: int = 0  # the version that happened last
    time: int = 0  # when
    captured: object = None  # the capture that it was last recorded in
    nodes: frozenset[object] = frozenset()  # the nodes of that capture that it stands for


@dataclass(eq=False)
class Record:
    """An event that is to happen."""

    event: Event
    version: int


@dataclass(eq=False)
class Wait:
    """An event that the stream waits for."""

    event: Event
    version: int


@dataclass(eq=False)
class GraphLaunch:
    """One launch of a graph: tasks, each after others of them."""

    graph: object
    waiting: dict[object, set[object]]  # node → the nodes that it still waits for
    tasks: dict[object, Task | None]
    pace: dict[object, float]


Work = Task | Record | Wait | GraphLaunch


@dataclass(eq=False)
class Stream:
    """A stream; `int` of it is the handle that libraries are given."""

    number: int
    device: int
    pace: float  # how soon it goes on, against others
    queue: deque[Work] = field(default_factory=deque)
    capture: object = None  # what it is being captured into

    def __int__(self) -> int:
        return self.number


class Scheduler:
    """Does the work of all streams, one piece at a time, and no sooner than it must or a random number says."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.time = 0
        self.eagerness = self.random.choice((0.0, 0.0, 0.0, 0.1, 0.6))  # how much is done while nobody waits
        self.refuse: Callable[[Task], str | None] = lambda task: None
        self.failed: Callable[[str], None] = lambda reason: None

    def pace(self) -> float:
        """A random pace; one is often much quicker than another."""
        return self.random.random() ** 3 + 1e-3

    def meanwhile(self) -> None:
        """What may happen while the host does something else."""
        while self.random.random() < self.eagerness and self._step():
            pass

    def drain(self, stream: Stream) -> None:
        """Do all that is on a stream, and whatever else happens before."""
        while stream.queue:
            if not self._step():
                raise AssertionError("the GPU hangs: every stream waits for an event that never happens")

    def pending(self) -> Iterable[tuple[Stream, Work]]:
        """What is not done yet."""
        return ((stream, work) for stream in self.streams for work in stream.queue)

    def _step(self) -> bool:
        """Do one piece of what can be done now; False if there is none."""
        ready: list[tuple[float, Stream, object]] = []
        for stream in self.streams:
            if not stream.queue:
                continue
            match stream.queue[0]:
                case Wait(event, version) if event.done < version:
                    pass
                case GraphLaunch() as run:
                    ready += [(run.pace[node], stream, node) for node, after in run.waiting.items() if not after]
                case _:
                    ready.append((stream.pace, stream, None))
        if not ready:
            return False
        ((_, stream, node),) = self.random.choices(ready, [pace for pace, _, _ in ready])
        self.time += 1
        match stream.queue[0]:
            case Task() as task:
                self._do(task)
            case Record(event, version):
                event.done, event.time = version, self.time
            case GraphLaunch() as run:
                self._do(run.tasks[node])
                del run.waiting[node]
                for after in run.waiting.values():
                    after.discard(node)
                if run.waiting:
                    return True
        stream.queue.popleft()
        return True

    def _do(self, task: Task | None) -> None:
        if task is None:
            return
        if reason := self.refuse(task):
            self.failed(reason)
        else:
            task.run()
