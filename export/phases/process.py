"""Heavy phases run in a process of their own, so that their memory is returned.

Arguments and results travel as JSON: a dataclass becomes plain values, and an argument what the job's annotation says.
The parent writes a line for each job (`{"job": "module:function", "arguments": {…}}`) to the child's stdin and
keeps it open: when it closes, the child ends, so a killed build leaves nothing running. The child hears of Ctrl-C in
no other way: its job's next call of `progress` raises KeyboardInterrupt, and soon after it ends in any case. The child
writes JSON lines: `{"progress": [done, total]}`, `{"warning": text}`, and last of each job `{"result": …,
"peak_bytes": …}` or `{"error": …, "kind": …}`.
"""

import errno
import gc
import importlib
import json
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from turbochain.runtime import errors
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.errors import InputError, NoSpace, PhaseDied, TurbochainError

Progress = Callable[[int, int], None]

log = logging.getLogger("turbochain")

# Both are read when huggingface_hub is imported.
_SILENT = {"HF_HUB_DISABLE_TELEMETRY": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}  # not every loader of diffusers and transformers heeds `local_files_only`

_RARELY = (50_000, 5, 2)
"""How many objects are made between Python's searches for garbage: an import or a trace makes a million that stay."""

_GRACE = 1.0  # seconds that a job has to end by itself


class JobProcess:
    """A child that runs jobs, one after the other. It ends with the `with` block, or with a job that fails."""

    def __init__(self, lock: int, printed: Path | None, *, online: bool = False) -> None:
        """Start a child that keeps the file descriptor `lock` open, so that the lock lives as long as the child.

        What libraries print goes to the file `printed`, or to stderr if it is None. Unless it is `online`, the
        libraries that know the hub do not ask it for anything.
        """
        self._printed = printed
        # The child inherits that it does not hear of Ctrl-C, which a terminal sends to both.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._child = _start(lock, printed, online)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def run(self, job: str, arguments: dict[str, Any], progress: Progress) -> tuple[Any, int]:
        """Run a job; returns its result and the peak of the child's resident memory meanwhile, in bytes.

        Raises what the child raised, if it is a TurbochainError, or a TurbochainError that describes it; PhaseDied
        if the child ended without a word.
        """
        child = self._child
        assert child.stdin and child.stdout
        last: dict[str, Any] = {}
        try:
            with suppress(BrokenPipeError):  # it has died: that shows below
                child.stdin.write(json.dumps({"job": job, "arguments": strict_json.plain(arguments)}) + "\n")
                child.stdin.flush()
            for line in child.stdout:
                last = json.loads(line)
                if "progress" in last:
                    progress(*last["progress"])
                if "warning" in last:
                    log.warning("%s", last["warning"])
                if "result" in last:
                    return last["result"], last["peak_bytes"]
                if "error" in last:
                    break
        except BaseException:
            self.close()
            raise
        raise _failure(job, last, None if "error" in last else child.wait(), self._printed)

    def close(self) -> None:
        """Let the child end by itself, or else, or at a second Ctrl-C, kill it."""
        assert self._child.stdin
        try:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._child.stdin.close()
                self._child.wait(2 * _GRACE)
        finally:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> "JobProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(lock: int, printed: Path | None, online: bool) -> "subprocess.Popen[str]":
    output = printed.open("ab") if printed else None
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            pass_fds=(lock,),
            env={**os.environ, **_SILENT, **({} if online else _OFFLINE)},
            text=True,
        )
    finally:
        if output:
            output.close()


def _failure(job: str, last: dict[str, Any], status: int | None, printed: Path | None) -> TurbochainError:
    if status is None:
        return getattr(errors, last["kind"])(last["error"])
    name = job.rpartition(":")[2]
    if status < 0:
        reason = f"was killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    else:
        reason = f"ended with status {status}"
    where = f"; what it printed is in {printed}" if printed else ""
    return PhaseDied(f"the phase {name} {reason}{where}")


def main() -> None:
    """Run the child's side."""
    gc.set_threshold(*_RARELY)
    requests: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    threading.Thread(target=_listen, args=(requests, cancelled), daemon=True).start()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an event
    sys.stdout = sys.stderr

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    def progress(done: int, total: int) -> None:
        if cancelled.is_set():
            raise KeyboardInterrupt
        send(progress=[done, total])

    log.addHandler(_Forward(send))
    log.propagate = False
    while line := requests.get():
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory is reset
        _carry_out(**json.loads(line), progress=progress, send=send)
        sys.stdout.flush()
    os._exit(0)  # no library's exit handlers: some of them take seconds


def _carry_out(job: str, arguments: dict[str, Any], progress: Progress, send: Callable[..., None]) -> None:
    module, _, function = job.partition(":")
    try:
        carry_out = getattr(importlib.import_module(module), function)
        kinds = typing.get_type_hints(carry_out)
        given = {k: strict_json.convert(kinds[k], v) if k in kinds else v for k, v in arguments.items()}
        result = strict_json.plain(carry_out(progress, **given))
    except KeyboardInterrupt:
        pass  # nobody listens any more
    except TurbochainError as error:
        send(error=str(error), kind=type(error).__name__)
    except Exception as error:
        traceback.print_exc()
        kind, message = _describe(function, error)
        send(error=message, kind=kind.__name__)
    else:
        send(result=result, peak_bytes=_peak_bytes())


def _describe(function: str, error: Exception) -> tuple[type[TurbochainError], str]:
    """Return an exception that is not ours as one sentence."""
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    if full:
        return (
            NoSpace,
            "no space left on the disk of the bundle; free some, and run the same command again",
        )
    if isinstance(error, ModuleNotFoundError):
        return InputError, f"{error.name} is not installed: pip install 'turbochain[export]'"
    lines = str(error).strip().splitlines() or [""]
    return (
        TurbochainError,
        f"the phase {function} failed: {type(error).__name__}: {lines[0][:300]} (-v shows all)",
    )


def _peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:  # on Linux, ru_maxrss begins with what the parent had when it forked
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def _listen(requests: "queue.SimpleQueue[str | None]", cancelled: threading.Event) -> None:
    for line in sys.stdin:
        requests.put(line)
    cancelled.set()
    requests.put(None)
    time.sleep(_GRACE)
    os._exit(1)


class _Forward(logging.Handler):
    """What this process warns of is said by its parent."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send(warning=record.getMessage())
