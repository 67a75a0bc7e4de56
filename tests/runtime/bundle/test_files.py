"""Files are hashed before use, and a path stays inside the bundle."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from other_process import process, said

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing, paths
from turbochain.runtime.bundle.hashing import CHUNK, FileRecord
from turbochain.runtime.errors import BundleError

GOLDEN = ROOT / "tests/golden/bundle"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "turbochain" / "hashes"


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
