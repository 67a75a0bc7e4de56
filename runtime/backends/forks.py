"""What a process that was forked does with a native library's objects: it keeps them for ever, untouched.

A fork copies the objects and none of their threads, for which freeing one would wait without end, at the exit of the
process at the latest.
"""

import ctypes


def keep_for_ever(thing: object) -> None:
    """Never free an object, nor what it refers to, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
