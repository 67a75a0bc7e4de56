"""What becomes of a native library's objects and threads when the process is forked.

A fork copies the objects and none of the threads. Freeing an object would wait for its threads without end, at the exit
of the process at the latest.
"""

import ctypes
import os
import time
import weakref
from pathlib import Path
from typing import Protocol

_LOOKS, _PAUSE = 200, 0.005  # how often it is looked whether the other threads rest, and the seconds between


class Forked(Protocol):
    """What must know that it is in a process that was forked."""

    def abandon(self) -> None:
        """Give up what cannot be used or freed there."""


def watch(thing: Forked) -> None:
    """Let a thing, as long as it lives, be told in every process that is forked from this one."""
    _WATCHED.add(thing)


def keep_for_ever(thing: object) -> None:
    """Never free an object, nor what it refers to, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def let_threads_rest() -> None:
    """Wait until no other thread of the process works, for a second at most.

    The child has no copy of these threads. If one was busy at the fork, the child waits for it at its exit, for ever. A
    library's threads go on for a moment after a call of it has returned.
    """
    for _ in range(_LOOKS):
        if not _others_work():
            return
        time.sleep(_PAUSE)


def _others_work() -> bool:
    states = []
    for task in Path("/proc/self/task").glob("*/stat"):  # only Linux has it
        try:
            states.append(task.read_text().rpartition(")")[2].split()[0])
        except OSError:  # it has ended
            continue
    return len([state for state in states if state != "S"]) > 1  # this one is running


_WATCHED: weakref.WeakSet[Forked] = weakref.WeakSet()


def _abandon_all() -> None:
    for thing in list(_WATCHED):
        thing.abandon()


os.register_at_fork(after_in_child=_abandon_all)
