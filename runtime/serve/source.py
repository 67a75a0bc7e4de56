"""Where pictures come from: this process's worker, or the replicas of Ray Serve."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from turbochain.runtime.request import Request
from turbochain.runtime.serve.adapters import Chosen


@dataclass(frozen=True)
class Job:
    """One picture that is asked for; equal jobs give equal pictures."""

    model: str
    request: Request  # of one picture, with a seed of its own
    client: str  # whose turn it takes
    adapters: Chosen = ()


@dataclass(frozen=True)
class Drawn:
    """A picture, and what it took."""

    picture: np.ndarray  # [H, W, 3] uint8
    seconds: float  # of the pass that made it, without waiting


@dataclass
class Progress:
    """How far a picture is; the source counts, others read."""

    done: int = 0  # passes of the loop


class PictureSource(Protocol):
    """Draws pictures for the server; every method is called on the server's event loop."""

    @property
    def state(self) -> "State":
        """Return what can be said about it now."""

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        """Draw one picture. If the task that awaits this is cancelled, nobody wants the picture any more.

        Raises Refused: 503 or 429 if there is no room, 503 if it takes too long, 500 if the model makes no picture, 400
        if an adapter does not fit it.
        """

    async def start(self) -> None:
        """Begin to load; returns at once."""

    async def close(self) -> None:
        """Draw all accepted pictures, then stop."""


@dataclass(frozen=True)
class State:
    """What a source is doing."""

    ready: bool  # whether it has made its first picture, and accepts more
    alive: bool = True  # whether it can make any: not after a CudaFault
    waiting: int = 0  # pictures in the queue
    problem: str | None = None  # why it is not alive
