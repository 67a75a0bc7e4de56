"""Files and folders are written whole or not at all, and a folder has one builder at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from other_process import PRELUDE, process, said

from turbochain.runtime.bundle import writing
from turbochain.runtime.bundle.lock import lock_directory
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.errors import InputError

# --- writing


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "Ω\n")
    assert path.read_bytes() == b"\xce\xa9\n"
    write_atomically(str(path), b"\0\1")
    assert path.read_bytes() == b"\0\1"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["f"]


def test_a_bare_name_is_written_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically("f", "x")
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_an_exception_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "f"
    path.write_text("old")
    expected = InputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), writing.atomic_write(path) as file:
        file.write(b"new")
        raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_an_error_about_another_file_is_not_called_ours(tmp_path):
    with pytest.raises(FileNotFoundError), writing.atomic_write(tmp_path / "f"):
        (tmp_path / "other").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_writer_killed_halfway_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    code = (
        "with atomic_write(sys.argv[1]) as file:\n    file.write(bytes(10**6)); file.flush()\n"
        "    print('half', flush=True); time.sleep(60)"
    )
    with process(code, path) as child:
        assert said(child) == "half"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [name.startswith(".turbochain-") for name in os.listdir(tmp_path) if name != "f"] == [True]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, b"a" * 300_000)
    code = "for i in range(60):\n    write_atomically(sys.argv[1], (b'a', b'b')[i % 2] * 300_000)"
    with process(code, path) as child:
        while child.poll() is None:
            content = path.read_bytes()
            assert len(content) == 300_000 and len(set(content)) == 1
        assert child.returncode == 0


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for path, why in [
        (tmp_path / "none" / "f", "No such file or directory"),
        (tmp_path / "file" / "f", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (Path("/proc/turbochain"), ""),  # refuses even root
    ]:
        with pytest.raises(InputError) as caught:
            write_atomically(path, "x")
        assert str(caught.value).startswith(f"cannot write {path}: ") and why in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_no_space_left_without_privileges():
    # A tmpfs refuses at once to reserve more than its whole size, and touches nothing.
    shm = Path("/dev/shm")
    whole = os.statvfs(shm).f_blocks * os.statvfs(shm).f_frsize
    path = shm / f"turbochain-test-{os.getpid()}"
    before = set(os.listdir(shm))
    try:
        path.write_text("old")
        with (
            pytest.raises(InputError, match=f"no space left to write {path}: {2 * whole} bytes are needed"),
            writing.atomic_write(path, size=2 * whole) as file,
        ):
            os.posix_fallocate(file.fileno(), 0, 2 * whole)
        assert path.read_text() == "old"
    finally:
        path.unlink()
    assert not [name for name in set(os.listdir(shm)) - before if name.startswith(".turbochain-")]


FULL_DISK = """
os.chdir(sys.argv[1])
write_atomically("f", "old")
open("ballast", "wb").write(bytes(900_000))
try:
    write_atomically("f", bytes(500_000))
except ValueError as error:
    print(error)
print(open("f").read(), sorted(os.listdir(".")))
os.unlink("ballast")
write_atomically("f", bytes(500_000))
print(os.path.getsize("f"))
"""
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
PRIVATE = ["unshare", "--user", "--map-root-user", "--mount"]  # the mount goes with the process


def test_a_full_disk(tmp_path):
    if subprocess.run([*PRIVATE, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode:
        return test_no_space_left_without_privileges()
    command = [*PRIVATE, "sh", "-c", MOUNT, "sh", str(tmp_path), sys.executable, PRELUDE + FULL_DISK]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("no space left to write f: 500000 bytes are needed, ")
    assert 0 < int(lines[0].split(", ")[1].split()[0]) < 2**20 - 900_000
    assert lines[1:] == ["old ['ballast', 'f']", "500000"]


def test_a_directory_is_installed_once(tmp_path):
    new, final = tmp_path / ".new", tmp_path / "engine"
    for attempt in ("first", "second"):
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "plan").write_text(attempt)
        (new / "link").symlink_to("nowhere")
        if attempt == "first":
            writing.install_directory(new, final)
            assert not new.exists()
    with pytest.raises(InputError, match="engine: it exists already"):
        writing.install_directory(new, final)
    assert (final / "deep" / "plan").read_text() == "first" and (new / "deep" / "plan").exists()
    with pytest.raises(InputError, match=r"cannot write .*none/x: No such file"):
        writing.install_directory(new, tmp_path / "none" / "x")


# --- locking

OWNER = """
with lock_directory(sys.argv[1], on_wait=lambda: print("waiting", flush=True)) as fd:
    print("locked", flush=True)
    exec(sys.stdin.readline())
"""


def test_a_lock_excludes_and_ends_with_its_owner(tmp_path):
    path = tmp_path / "deep" / "engine"
    with process(OWNER, path) as owner:
        assert said(owner) == "locked"
        with process(OWNER, path) as other:
            assert said(other) == "waiting"
            owner.send_signal(signal.SIGKILL)
            assert said(other) == "locked"
            other.communicate("pass\n")
            assert other.returncode == 0
    assert list(path.iterdir()) == [] and os.listdir(path.parent) == ["engine"]


def test_a_worker_that_has_the_descriptor_keeps_the_lock(tmp_path):
    start = "p = subprocess.Popen(['sleep', '60'], pass_fds=[fd]); print(p.pid, flush=True); time.sleep(60)\n"
    with process(OWNER, tmp_path) as owner:
        assert said(owner) == "locked"
        owner.stdin.write(start)
        owner.stdin.flush()
        worker = int(said(owner))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        try:
            with process(OWNER, tmp_path) as other:
                assert said(other) == "waiting"
                os.kill(worker, signal.SIGKILL)
                assert said(other) == "locked"
        except BaseException:
            os.kill(worker, signal.SIGKILL)
            raise


@pytest.mark.parametrize("end", ["os.rename(sys.argv[1], sys.argv[1] + '.final')", "os.rmdir(sys.argv[1])"])
def test_who_waited_gets_the_directory_that_has_the_name_now(tmp_path, end):
    path = tmp_path / "engine"
    see = "print(os.fstat(fd).st_ino == os.stat(sys.argv[1]).st_ino)\n"
    with process(OWNER, path) as owner:
        assert said(owner) == "locked"
        with process(OWNER, path) as other:
            assert said(other) == "waiting"
            owner.communicate(end + "\n")
            assert said(other) == "locked"
            assert other.communicate(see)[0].strip() == "True"
    assert path.is_dir() and (tmp_path / "engine.final").exists() == ("final" in end)


def test_waiting_twice_is_told_once(tmp_path):
    path, waiting, waits = tmp_path / "engine", threading.Event(), []

    def contend():
        with lock_directory(path, on_wait=lambda: (waits.append(1), waiting.set())):
            pass

    contender = threading.Thread(target=contend)
    with ExitStack() as second:
        with lock_directory(path):
            contender.start()
            assert waiting.wait(30)
            path.rename(tmp_path / "final")
            second.enter_context(lock_directory(path))
        contender.join(0.2)  # it got the renamed one, and waits again
        assert contender.is_alive()
    contender.join(30)
    assert not contender.is_alive() and waits == [1]


def test_two_processes_do_not_lose_a_count(tmp_path):
    code = """
for _ in range(200):
    with lock_directory(sys.argv[1]):
        with open(sys.argv[2], "r+") as file:
            count = int(file.read()); file.seek(0); time.sleep(0.0002); file.write(str(count + 1))
"""
    (tmp_path / "count").write_text("1000")
    with (
        process(code, tmp_path / "d", tmp_path / "count") as a,
        process(code, tmp_path / "d", tmp_path / "count") as b,
    ):
        assert (a.wait(60), b.wait(60)) == (0, 0)
    assert (tmp_path / "count").read_text() == "1400"


def test_a_lock_is_released_after_an_exception_and_told_apart_from_errors(tmp_path):
    waits: list[int] = []
    with pytest.raises(KeyError), lock_directory(tmp_path / "d"):
        raise KeyError
    with lock_directory(tmp_path / "d", on_wait=lambda: waits.append(1)) as fd:
        assert os.path.samestat(os.fstat(fd), os.stat(tmp_path / "d"))
        assert not os.get_inheritable(fd)
    assert waits == []
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (tmp_path / "file", tmp_path / "dangling", tmp_path / "file" / "d"):
        with pytest.raises(InputError, match=f"cannot lock {path}"), lock_directory(path):
            pass
