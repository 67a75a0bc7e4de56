"""A phase in a process of its own: what it says reaches its parent, and it ends when nobody waits for it."""

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kept import locked

from turbochain.export.phases import process
from turbochain.runtime.errors import PhaseDied

JOBS = """
import logging, os, signal, time

def warns(progress):
    logging.getLogger("turbochain").warning("mind the %s", "gap")
    return 3

def pid(progress):
    return os.getpid()

def holds(progress, megabytes):
    return len(bytearray(megabytes * 2**20))

def dies(progress):
    print("its last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def asks(progress):
    import huggingface_hub
    try:
        huggingface_hub.HfApi(endpoint="http://127.0.0.1:9").model_info("owner/name")  # nobody listens there
    except Exception as error:
        return type(error).__name__

def polls(progress):
    try:
        while True:
            progress(1, 2)
            time.sleep(0.01)
    finally:
        open(os.environ["ENDED"], "w").close()

def sleeps(progress):
    progress(1, 2)
    time.sleep(20)  # far longer than a job is given
    open(os.environ["ENDED"], "w").close()
"""

BUILDER = """
import fcntl, os, sys
from turbochain.export.phases.process import JobProcess
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
JobProcess(lock, None).run("jobs:sleeps", {}, lambda done, total: print(done, flush=True))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a job of `JOBS`."""
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("ENDED", str(tmp_path / "ended"))
    lock = os.open(tmp_path, os.O_RDONLY)

    def run(name: str, progress: process.Progress = lambda done, total: None, **how: bool) -> Any:
        with process.JobProcess(lock, tmp_path / "printed", **how) as child:
            return child.run(f"jobs:{name}", {}, progress)

    yield run
    os.close(lock)


@pytest.mark.parametrize(("online", "error"), [(False, "OfflineModeIsEnabled"), (True, "ConnectError")])
def test_only_one_that_is_online_asks_the_hub(run, monkeypatch: pytest.MonkeyPatch, online: bool, error: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert run("asks", online=online)[0] == error


def test_its_warnings_are_its_parents(run, caplog: pytest.LogCaptureFixture) -> None:
    result, _ = run("warns")
    assert result == 3
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("turbochain", logging.WARNING, "mind the gap")
    ]


def test_one_that_is_killed_is_told_from_one_that_fails(run, tmp_path: Path) -> None:
    with pytest.raises(PhaseDied) as error:
        run("dies")
    where = tmp_path / "printed"
    assert str(error.value) == f"the phase dies was killed by signal 9 (out of memory?); what it printed is in {where}"
    assert where.read_text() == "its last words\n"


@pytest.mark.parametrize(("job", "ended"), [("polls", True), ("sleeps", False)])
def test_ctrl_c_ends_it(run, tmp_path: Path, job: str, ended: bool) -> None:
    """A job that calls `progress` ends by itself, and one that does not is ended; neither prints anything."""

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, interrupted)
    assert (tmp_path / "ended").exists() == ended and (tmp_path / "printed").read_text() == ""


def test_it_ends_and_gives_the_lock_back_when_its_builder_is_killed(run, tmp_path: Path) -> None:
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, tmp_path / "lock"], stdout=subprocess.PIPE)
    assert builder.stdout and builder.stdout.readline() == b"1\n"
    builder.kill()
    builder.communicate()
    with locked(tmp_path / "lock"):
        assert not (tmp_path / "ended").exists()


def test_it_runs_one_job_after_the_other_and_measures_each(tmp_path: Path, run) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    with process.JobProcess(lock, None) as child:
        ask = functools.partial(child.run, progress=lambda done, total: None)
        first, _ = ask("jobs:pid", {})
        large, peak = ask("jobs:holds", {"megabytes": 300})
        second, after = ask("jobs:pid", {})
    os.close(lock)
    assert first == second != os.getpid()
    assert large == 300 * 2**20 < peak and after < peak - 200 * 2**20
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
