"""What becomes of a native library's objects and threads when the process is forked.

A fork copies the objects and none of the threads. Freeing an object would wait for its threads without end, at the exit
of the process at the latest; and what a thread was in the middle of is never finished there. So a fork waits for what
other threads launch or load, and they wait for it.
"""

import concurrent.futures.thread  # noqa: F401  # before a fork its handler takes a lock that a load needs
import ctypes
import os
import threading
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
    """Keep an object, and what it refers to, for ever: even the interpreter's end does not free it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def gate() -> threading.RLock:
    """Return a lock to hold while a library computes or loads, and at no other time: every fork waits for it.

    No code of a caller may run meanwhile, for that could wait for the fork. A fork in the thread that holds it, from a
    signal's handler, does not wait.
    """
    made = threading.RLock()
    with _ONE_FORK:
        _GATES.add(made)
    return made


def let_threads_rest() -> None:
    """Let forks wait from now on until no other thread of the process works, for a second at most.

    The child has no copy of these threads. If one was busy at the fork, the child waits for it at its exit, for ever. A
    library's threads go on for a moment after a call of it has returned.
    """
    _RESTING.set()


def _wait_for_others() -> None:
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
_GATES: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_ONE_FORK = threading.RLock()  # of two forks at once each would hold what the other waits for
_TAKEN: list[threading.RLock] = []
_RESTING = threading.Event()


def _before() -> None:
    _take(_ONE_FORK)
    for one in list(_GATES):
        _take(one)
    if _RESTING.is_set():
        _wait_for_others()


def _take(lock: threading.RLock) -> None:
    lock.acquire()
    _TAKEN.append(lock)


def _let_go() -> None:
    taken, _TAKEN[:] = _TAKEN[:], []  # the next fork begins when the last of them is released
    for lock in reversed(taken):
        lock.release()


def _in_child() -> None:
    for thing in list(_WATCHED):
        thing.abandon()
    _let_go()


# Before a fork the handlers run in the reverse order: this one, then that of concurrent.futures.
os.register_at_fork(before=_before, after_in_parent=_let_go, after_in_child=_in_child)
