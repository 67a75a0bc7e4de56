"""Seconds of what runs on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def median(work: Callable[[], object], device: torch.device, runs: int, warmup: int = 3) -> float:
    """Return the median seconds of `work`: between events on a GPU's current stream, else by the clock."""
    for _ in range(warmup):
        work()
    return statistics.median(_one(work, device) for _ in range(runs))


def _one(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    work()
    end_event.record()
    end_event.synchronize()
    return 1e-3 * start_event.elapsed_time(end_event)
