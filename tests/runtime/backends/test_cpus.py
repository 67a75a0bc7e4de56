"""How many CPUs a process may use, from files as Linux writes them, and from its affinity."""

import os
from pathlib import Path

import pytest

from turbochain.runtime import InputError, Pipeline
from turbochain.runtime.backends import cpus

V2, V1 = "0::{path}\n", "5:memory:/x\n3:cpu,cpuacct:{path}\n0::/\n"


@pytest.mark.parametrize(
    ("own", "path", "files", "expected"),
    [
        (V2, "/", {"cpu.max": "max 100000"}, None),
        (V2, "/", {}, None),
        (V2, "/", {"cpu.max": "200000 100000"}, 2),
        (V2, "/", {"cpu.max": "150000 100000"}, 2),
        (V2, "/", {"cpu.max": "5000 100000"}, 1),
        (V2, "/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (V2, "/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        (V2, "/a/b", {"a/b/cpu.max": "400000 100000", "cpu.max": "100000 100000"}, 1),
        (V2, "/of/the/host", {"cpu.max": "200000 50000"}, 4),
        (V1, "/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        (V1, "/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1, "/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_quota_is_that_of_the_tightest_group(
    own: str, path: str, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own.format(path=path))
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert cpus.quota(tmp_path / "groups", tmp_path / "own") == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpus.quota(tmp_path, tmp_path / "none") is None


def test_more_threads_than_the_affinity_allows_are_refused(sd: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with pytest.raises(InputError) as caught:
            Pipeline.load(sd, threads=2)
        Pipeline.load(sd, threads=1).close()
    finally:
        os.sched_setaffinity(0, allowed)
    assert str(caught.value).startswith("threads=2: at most 1 was expected")


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512_vnni amx_int8\n", True),
        ("x86_64", "flags\t\t: fpu avx2 avx_vnni\n", True),
        ("AMD64", "flags\t\t: fpu avx avx2 fma\n", False),
        ("x86_64", "processor\t: 0\n", False),
        ("aarch64", "Features\t: fp asimd\n", True),
    ],
)
def test_vnni_is_one_of_the_flags(
    machine: str, flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: x\n" + flags)
    assert cpus.has_vnni(tmp_path / "cpuinfo") == expected


def test_without_a_file_there_is_no_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not cpus.has_vnni(tmp_path / "none")
