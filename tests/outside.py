"""Run a command that must not reach the network: `python outside.py [--listening] COMMAND …`; Linux only.

The kernel (seccomp) ends every process of it that makes an internet socket by SIGSYS, whether Python asks or a
library's native code, for a connection or for a look-up of a name. With `--listening` it may make sockets that listen,
but it is ended if one of them connects, or is of another protocol than TCP. Exit status: the command's, or `REACHED` if
it or a process that outlived its parent was ended so. (What a process does with a child that it waits for, it says
itself.) SIGTERM is passed on to the command.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REACHED = 97
PROBE = "import socket\nsocket.has_ipv6 = False  # at its import urllib3 makes a socket to see whether there is IPv6\n"
CALLS = {"x86_64": (0xC000003E, 41, 42), "aarch64": (0xC00000B7, 198, 203)}
"""Machine → audit's number for it, and those of the system calls `socket` and `connect`."""
LISTENING = "--listening"
_ENDS_WITH_PARENT, _NO_NEW_PRIVILEGES, _SECCOMP, _SUBREAPER = 1, 38, 22, 36  # of prctl
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06


def run(*arguments: object, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command so, with `home` as its home and its folder for temporary files, which are made."""
    more = {**prepared(home), "timeout": 600, **options}
    return subprocess.run(_line(arguments), capture_output=True, **more)  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def serving(*arguments: object, home: Path, **options: object) -> Iterator["subprocess.Popen[str]"]:
    """Start a command that may listen, as `run` does, and end it."""
    line = _line((LISTENING, *arguments))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, **prepared(home), **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(arguments: Iterable[object]) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def prepared(home: Path) -> dict[str, Any]:
    """Make a home, and return the options of `subprocess` for a command that has it."""
    installed(home).mkdir(parents=True, exist_ok=True)
    (installed(home) / "sitecustomize.py").write_text(PROBE)
    (home / "tmp").mkdir(exist_ok=True)
    own = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONPATH": str(installed(home))}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "ORT_"))}
    return {"env": {**kept, **own}, "text": True}


def installed(home: Path) -> Path:
    """The folder of Python modules that come before the environment's own."""
    return home / "python"


def left(home: Path) -> set[str]:
    """What a command has left in `home` beside turbochain's own notes on files, relative to it."""
    ours = (installed(home), home / ".cache" / "turbochain" / "hashes")
    files = (path for path in home.rglob("*") if path.is_file() and not any(path.is_relative_to(of) for of in ours))
    return {str(path.relative_to(home)) for path in files}


def _prctl(option: int, value: object, pointer: object = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0):  # type: ignore[arg-type]
        raise OSError(ctypes.get_errno(), "prctl")


def _filter(listening: bool) -> bytes:
    """The kernel's program: what is read is the number of a call at 0, the machine at 4, arguments at 16 and 24.

    A step has how many of the next ones are left out if it finds what it looks for, and if it does not.
    """
    machine, socket, connect = CALLS[platform.machine()]
    shut = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, 6, machine),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 4, socket),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 1, 0, 2),  # AF_INET
        (_EQUAL, 0, 1, 10),  # AF_INET6
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    open_to_others = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, 10, machine),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 7, 0, connect),
        (_EQUAL, 0, 7, socket),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 1, 0, 2),
        (_EQUAL, 0, 4, 10),
        (_LOAD, 0, 0, 24),
        (_AND, 0, 0, 0xF),  # the type, without flags
        (_EQUAL, 1, 0, 1),  # SOCK_STREAM
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in (open_to_others if listening else shut))


def _shut_off(listening: bool) -> None:
    """Let this process, and all that it starts, end at an internet socket, or at one that does not listen."""
    program = _filter(listening)
    held = ctypes.create_string_buffer(program)
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_ENDS_WITH_PARENT, signal.SIGKILL)
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _prctl(_SECCOMP, 2, ctypes.c_char_p(described))


def _ends() -> Iterator[tuple[int, int]]:
    """Wait for every process that is left; yield its id and how it ended."""
    while True:
        try:
            yield os.wait()
        except ChildProcessError:
            return


def main(line: list[str]) -> int:
    listening, line = line[0] == LISTENING, line[line[0] == LISTENING :]
    _prctl(_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        _shut_off(listening)
        os.execvp(line[0], line)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    ends = dict(_ends())
    reached = any(os.WIFSIGNALED(how) and os.WTERMSIG(how) == signal.SIGSYS for how in ends.values())
    return REACHED if reached else os.waitstatus_to_exitcode(ends[child])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
