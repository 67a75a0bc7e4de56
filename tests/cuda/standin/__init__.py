"""A CUDA runtime in host memory, in place of `cuda.bindings.runtime`, for machines without a GPU.

It stands in for hardware and driver, not for a backend: the executor, the capture and `cuda.py` run for real over it.
It is stricter than CUDA wherever CUDA leaves something open:

- work on a stream is done late, in a random order (of a seed) among all that streams and events allow;
- memory holds 0xFF (NaN) before its first write and after its free, and has guards around it;
- a capture refuses what CUDA refuses: allocating, waiting, events of outside, forks that do not join.

`Runtime.misuse` collects what a program must never do, whatever became of the picture.
"""

from .machine import STICKY, Error, Module
from .runtime import Runtime
from .stages import UNWANTED, OneByOne, Stage, StandIn, gpu, pipeline, standing_in, uncaptured

__all__ = [
    "STICKY",
    "UNWANTED",
    "Error",
    "Module",
    "OneByOne",
    "Runtime",
    "Stage",
    "StandIn",
    "gpu",
    "pipeline",
    "standing_in",
    "uncaptured",
]
