"""Python's garbage collection, which stands still while any thread captures a CUDA graph.

What the destructor of an unrelated object frees or waits for would break the capture. Nothing is collected before it:
what is garbage then stays so until the capture has ended, and with PyTorch loaded a collection takes a quarter second.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_captures = 0  # that are going on in this process
_was_enabled = True  # before the first of them


def collect() -> None:
    """Free what only refers to itself, unless a graph is being captured."""
    with _lock:
        if not _captures:
            gc.collect()


@contextmanager
def kept() -> Iterator[None]:
    """Keep garbage from being collected while the block runs."""
    global _captures, _was_enabled
    with _lock:
        if not _captures:
            _was_enabled = gc.isenabled()
        _captures += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _captures -= 1
            if not _captures and _was_enabled:
                gc.enable()
