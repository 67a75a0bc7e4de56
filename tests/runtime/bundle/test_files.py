import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing, paths, writing
from turbochain.runtime.bundle.hashing import CHUNK, FileRecord
from turbochain.runtime.bundle.lock import lock_directory
from turbochain.runtime.bundle.writing import write_atomically
from turbochain.runtime.errors import BundleError, InputError

GOLDEN = ROOT / "tests/golden/bundle"
PRELUDE = """import os, subprocess, sys, time
from turbochain.runtime.bundle.hashing import *
from turbochain.runtime.bundle.lock import *
from turbochain.runtime.bundle.writing import *
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "turbochain" / "hashes"


@contextmanager
def process(code: str, *args: object):
    """Another Python that talks over pipes; killed at the end whatever it does."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def said(child) -> str:
    return child.stdout.readline().strip()


def sparse(path: Path, size: int, **content: bytes) -> Path:
    """A large file that is nearly all holes: `at_N=bytes` lies at offset N."""
    with open(path, "wb") as file:
        file.truncate(size)
        for place, data in content.items():
            file.seek(int(place.removeprefix("at_")))
            file.write(data)
        file.truncate(size)
    return path


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# --- hashing


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK])
def test_up_to_a_chunk_the_digest_is_the_plain_sha256(tmp_path, size):
    path = sparse(tmp_path / "f", size)
    assert hashing.digest(path) == hashlib.sha256(bytes(size)).hexdigest()


@pytest.mark.parametrize("size", [CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 300_001])
def test_a_larger_file_is_hashed_by_chunks(tmp_path, size):
    path = sparse(tmp_path / "f", size, at_5=b"first", at_67108862=b"across the border")
    expected, seen = hashlib.sha256(), []
    with open(path, "rb") as file:
        while block := file.read(64 * 1024 * 1024):
            expected.update(hashlib.sha256(block).digest())
    assert hashing.digest(path, progress=seen.append) == expected.hexdigest()
    assert sum(seen) == size and len(seen) > 1
    assert hashing.describe(path) == FileRecord(size, expected.hexdigest())


def test_hashing_needs_no_memory(tmp_path):
    path = sparse(tmp_path / "f", 4 * CHUNK)
    code = (
        "import resource\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); digest(sys.argv[1]); print(peak() - before)"
    )
    with process(code, path) as child:
        assert int(said(child)) < 2**14  # KiB; the file has 2**18


# --- checking


@pytest.fixture
def bundle(tmp_path):
    root = tmp_path / "bundle"
    (root / "graphs").mkdir(parents=True)
    (root / "graphs" / "unet.onnx").write_bytes(os.urandom(5000))
    (root / "graphs" / "vae.onnx").write_bytes(os.urandom(5000))
    (root / "model card").write_text("hello")
    return root


def described(root: Path) -> dict[str, FileRecord]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in paths
    }


def problem(root: Path, relative: str, record: FileRecord, full: bool = False) -> str:
    with pytest.raises(BundleError) as caught:
        hashing.check(root, relative, record, full=full)
    return str(caught.value)


def test_a_sound_bundle_passes(bundle):
    records = described(bundle)
    assert len(records) == 3
    hashing.check_all(bundle, records, full=False)
    hashing.check_all(bundle, records, full=True)
    for relative, record in records.items():
        hashing.check(bundle, relative, record, full=False)


def test_a_truncated_file(bundle):
    record = described(bundle)["graphs/unet.onnx"]
    os.truncate(bundle / "graphs" / "unet.onnx", 4999)
    message = problem(bundle, "graphs/unet.onnx", record)
    assert "'graphs/unet.onnx' is truncated: it has 4999 bytes, the manifest says 5000" in message
    assert str(bundle) in message


def test_a_file_with_a_byte_too_many(bundle):
    record = described(bundle)["graphs/unet.onnx"]
    with open(bundle / "graphs" / "unet.onnx", "ab") as file:
        file.write(b"\0")
    assert "it has 5001 bytes, the manifest says 5000" in problem(bundle, "graphs/unet.onnx", record)


def test_a_flipped_bit_even_with_its_mtime_restored(bundle):
    path = bundle / "graphs" / "unet.onnx"
    record = described(bundle)["graphs/unet.onnx"]
    hashing.check(bundle, "graphs/unet.onnx", record, full=False)
    before = path.stat()
    flip(path, 2500)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = problem(bundle, "graphs/unet.onnx", record)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"is damaged: its SHA-256 is {actual}, the manifest says {record.sha256}" in message


def test_two_files_swapped(bundle):
    records = described(bundle)
    unet, vae = bundle / "graphs" / "unet.onnx", bundle / "graphs" / "vae.onnx"
    unet.rename(bundle / "x")
    vae.rename(unet)
    (bundle / "x").rename(vae)
    with pytest.raises(BundleError, match=r"2 files .*(unet|vae)\.onnx' is damaged.*(unet|vae)\.onnx' is dam"):
        hashing.check_all(bundle, records, full=False)


def test_every_problem_is_named_at_once(bundle):
    records = described(bundle) | {"gone": FileRecord(1, "0" * 64), "../x": FileRecord(1, "0" * 64)}
    flip(bundle / "graphs" / "unet.onnx", 0)
    os.truncate(bundle / "graphs" / "vae.onnx", 0)
    with pytest.raises(BundleError) as caught:
        hashing.check_all(bundle, records, full=False)
    message = str(caught.value)
    assert "4 files" in message and "model card" not in message and "\n" not in message
    for part in (
        "'gone' is missing",
        "unet.onnx' is damaged",
        "vae.onnx' is truncated",
        "'../x' is not a path",
    ):
        assert part in message


def test_what_is_no_regular_file(bundle, tmp_path):
    os.mkfifo(bundle / "pipe")
    (tmp_path / "secret").write_text("hello")
    (bundle / "link").symlink_to(tmp_path / "secret")
    (bundle / "inner").symlink_to("model card")
    hello = described(bundle)["model card"]
    assert "'graphs' is not a regular file" in problem(bundle, "graphs", hello)
    assert "'pipe' is not a regular file" in problem(bundle, "pipe", hello)
    assert "link leads outside" in problem(bundle, "link", hello)
    assert "'model card/x' cannot be read" in problem(bundle, "model card/x", hello)
    hashing.check(bundle, "inner", hello, full=False)


def test_a_file_that_cannot_be_read_does_not_hide_the_next(tmp_path):
    """Linux refuses to read the start of a process's memory, which no right can change."""
    records = dict.fromkeys(("mem", "status"), FileRecord(0, "0" * 64))
    with pytest.raises(BundleError, match=r"2 files .*'mem' cannot be read: Input/output error; 'status' is damaged"):
        hashing.check_all("/proc/self", records, full=False)


# --- stamps


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A folder with files over a chunk, and a small one, all old enough to be stamped."""
    root = tmp_path_factory.mktemp("settled")
    (root / "more").mkdir()
    for name in ("a", "b", "c", "d", "more/a"):
        sparse(root / name, CHUNK + 10, at_100=name.encode())
    (root / "small").write_text("hello")
    time.sleep(2.1)
    return root


def test_a_stamped_file_is_not_read_again_unless_full(settled, cache):
    record = hashing.describe(settled / "a")
    hashing.check(settled, "a", record, full=False)
    (stamp,) = cache.iterdir()
    content = json.loads(stamp.read_text())
    assert content["sha256"] == record.sha256 and content["path"] == str(settled / "a")
    # A stamp that lies shows who is asked: the stamp, or with `full` the file.
    stamp.write_text(json.dumps(content | {"sha256": "f" * 64}))
    lie = FileRecord(record.size, "f" * 64)
    hashing.check(settled, "a", lie, full=False)
    assert "is damaged" in problem(settled, "a", lie, full=True)
    hashing.check(settled, "a", record, full=False)  # a stamp cannot accuse
    assert json.loads(stamp.read_text()) == content


def test_a_stamp_does_not_hide_a_changed_or_replaced_file(settled, cache):
    path = settled / "b"
    record = hashing.describe(path)
    hashing.check(settled, "b", record, full=False)
    assert len(list(cache.iterdir())) == 1
    before = path.stat()
    flip(path, CHUNK + 5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (
        before.st_mtime_ns,
        before.st_size,
        before.st_ino,
    )
    assert "is damaged" in problem(settled, "b", record)
    flip(path, CHUNK + 5)
    hashing.check(settled, "b", record, full=False)
    (settled / "c").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "is damaged" in problem(settled, "b", record)


def test_a_young_file_and_a_small_one_get_no_stamp(settled, bundle, cache):
    """Also not a young one whose mtime is old, as `cp -p` makes them."""
    os.utime(sparse(bundle / "copied", CHUNK + 1), ns=(10**18, 10**18))
    sparse(bundle / "large", CHUNK + 1)
    for name in ("large", "copied"):
        hashing.check(bundle, name, hashing.describe(bundle / name), full=False)
    hashing.check(settled, "small", hashing.describe(settled / "small"), full=False)
    assert not cache.exists()


@pytest.mark.parametrize("figure", ["path", "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_a_stamp_of_another_file_or_time_is_not_used(settled, cache, figure):
    record, lie = hashing.describe(settled / "a"), "f" * 64
    hashing.check(settled, "a", record, full=False)
    (stamp,) = cache.iterdir()
    content = json.loads(stamp.read_text()) | {"sha256": lie}
    stamp.write_text(json.dumps(content | {figure: content[figure] * 2}))
    assert "is damaged" in problem(settled, "a", FileRecord(record.size, lie))


def test_files_of_one_name_have_a_stamp_each_that_no_other_user_can_read(settled, cache):
    for name in ("a", "more/a"):
        hashing.check(settled, name, hashing.describe(settled / name), full=False)
    assert len(list(cache.iterdir())) == 2
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_file_that_changes_while_it_is_hashed_gets_no_stamp_that_vouches_for_it(settled, cache):
    record, changes = hashing.describe(settled / "d"), []

    def change(_: int) -> None:
        if not changes:  # the first chunk is hashed, the second may be
            changes.append(flip(settled / "d", 5))

    hashing.check_all(settled, {"d": record}, full=False, progress=change)
    assert changes and "is damaged" in problem(settled, "d", record)


def test_a_bundle_that_is_checked_in_full_asks_no_stamp(settled, cache):
    record = hashing.describe(settled / "a")
    hashing.check(settled, "a", record, full=False)
    (stamp,) = cache.iterdir()
    stamp.write_text(stamp.read_text().replace(record.sha256, "f" * 64))
    files = {"a": FileRecord(record.size, "f" * 64)}
    opened = Bundle(settled, replace(Bundle.open(GOLDEN).manifest, files=files, graphs={}))
    opened.check_files()
    with pytest.raises(BundleError, match="'a' is damaged"):
        opened.check_files(full=True)


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    """As the XDG Base Directory Specification says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative", "./x"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert hashing.user_cache() == tmp_path / ".cache/turbochain"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_stamp_is_not_used(settled, cache, content):
    """The file is hashed, which shows what a stamp that vouched for it would hide; then it is stamped again."""
    record = hashing.describe(settled / "a")
    hashing.check(settled, "a", record, full=False)
    (stamp,) = cache.iterdir()
    sound = stamp.read_bytes()
    stamp.write_bytes(content)
    assert "is damaged" in problem(settled, "a", FileRecord(record.size, "f" * 64))
    assert stamp.read_bytes() == content
    hashing.check(settled, "a", record, full=False)
    assert stamp.read_bytes() == sound


def test_a_cache_that_cannot_be_written_is_not_used(settled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    record = hashing.describe(settled / "a")
    hashing.check(settled, "a", record, full=False)
    assert "is damaged" in problem(settled, "a", FileRecord(record.size, "f" * 64))
    assert (tmp_path / "file").read_text() == ""


# --- paths


@pytest.mark.parametrize("relative", ["a", "graphs/unet.onnx", "./a", "a//b", "a..b/..c", "…/Ω", "new/folder/x"])
def test_paths_inside(bundle, relative):
    assert paths.resolve_inside(bundle, relative) == bundle / relative


@pytest.mark.parametrize(
    "relative",
    ["", ".", "./", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "a\\b", "..\\x", "a\0b", "\ud800"],
)
def test_paths_not_inside(bundle, relative):
    with pytest.raises(BundleError, match="is not a path inside the bundle") as caught:
        paths.resolve_inside(bundle, relative)
    str(caught.value).encode()  # can be printed


def test_an_absolute_path_is_refused_though_it_leads_inside(bundle):
    with pytest.raises(BundleError, match="is not a path inside the bundle: it is absolute"):
        paths.resolve_inside(bundle, str(bundle / "model card"))


@pytest.mark.parametrize(
    ("root", "followed"),
    [("snapshots/c0ffee", True), ("snapshots/c0ffee/a/bundle", True), ("versions/c0ffee", False), ("snapshots", False)],
)
def test_links_to_blobs_are_followed_in_a_snapshot_of_the_hubs_cache_alone(tmp_path, root, followed):
    blob, link = tmp_path / "models--o--n/blobs/0123", tmp_path / "models--o--n" / root / "f"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_text("hello")
    link.symlink_to(blob)
    if followed:
        assert paths.resolve_inside(link.parent, "f") == blob
    else:
        with pytest.raises(BundleError, match="a symbolic link leads outside"):
            paths.resolve_inside(link.parent, "f")


@pytest.mark.parametrize("relative", ["out", "out/x", "up/x", "chain", "chain/x"])
def test_links_that_lead_outside(bundle, tmp_path, relative):
    (bundle / "out").symlink_to(tmp_path)
    (bundle / "up").symlink_to("..")
    (bundle / "chain").symlink_to("out/bundle/out")
    with pytest.raises(BundleError, match=f"'{relative}' is not .*: a symbolic link leads outside"):
        paths.resolve_inside(bundle, relative)


def test_links_that_go_in_circles_or_nowhere(bundle, tmp_path):
    (bundle / "loop").symlink_to("loop")
    (bundle / "nowhere").symlink_to("nothing")
    record = FileRecord(1, "0" * 64)
    assert "'loop'" in problem(bundle, "loop", record)
    assert "'nowhere' is missing" in problem(bundle, "nowhere", record)
    assert "'a" in problem(bundle, "a" * 5000, record)
    (tmp_path / "alias").symlink_to(bundle)
    assert paths.resolve_inside(tmp_path / "alias", "a") == bundle / "a"


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
