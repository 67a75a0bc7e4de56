"""A source is the same if the files that a build reads have the same bytes, wherever they lie and however old."""

import ctypes
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from turbochain.export import load, tables
from turbochain.export.order import ExportOrder
from turbochain.export.sources import Want, find, parts
from turbochain.export.sources.checkpoint import open_folder
from turbochain.export.sources.digests import MEMORY, Digests
from turbochain.export.sources.weight_files import part_files_read
from turbochain.runtime import InputError
from turbochain.runtime.bundle import hashing

_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
TERMS = {"LICENSE", "README.md"}


@contextmanager
def opened(folder: Path) -> Iterator[set[str]]:
    """Collect the files under `folder` that this process opens, in whatever library; the kernel tells (inotify)."""
    libc, names = ctypes.CDLL(None, use_errno=True), set[str]()
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    watches = {libc.inotify_add_watch(descriptor, os.fsencode(p), _IN_OPEN): p for p in folders}
    assert descriptor >= 0 and -1 not in watches
    try:
        yield names
        data = os.read(descriptor, 2**20)
    finally:
        os.close(descriptor)
    while data:
        watch, mask, _, length = struct.unpack_from("iIII", data)
        name, data = data[16 : 16 + length].rstrip(b"\0").decode(), data[16 + length :]
        if name and not mask & _IN_ISDIR:
            names.add(str((watches[watch] / name).relative_to(folder)))


def read_all(source: Path, root: Path, replaced: dict[str, str], variant: str | None = None) -> None:
    """Read what an export reads: a checkpoint that is found and checked, diffusers' pipeline, traced components."""
    checkpoint = parts.fetch(find(str(source)), Want(root, variant=variant), replaced)
    load.pipeline(checkpoint)
    tables.tokenizers(checkpoint, checkpoint.family.tokenizers, root)
    for component in checkpoint.family.components:
        load.component(checkpoint, component, torch.float32, traceable=True)


@pytest.fixture
def source(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD miniature that a test may change, of the same times."""
    return shutil.copytree(checkpoints["sd"], tmp_path / "source")


def files(source: Path, vae: Path | None = None) -> dict[str, str]:
    return ExportOrder(str(source), vae=None if vae is None else str(vae)).requested("fp32").files


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_the_files_are_those_that_an_export_opens(
    family: str, checkpoints: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = shutil.copytree(checkpoints[family], tmp_path / "source")
    for stray in (".DS_Store", "unet/README.md", "unet/notes.safetensors", "text_encoder/pytorch_model.bin", "x.txt"):
        (source / stray).write_text("x")
    with opened(source) as names:
        read_all(source, tmp_path, {})
    told = files(source)
    assert names - TERMS <= told.keys()
    # transformers reads either tokenizer.json or these, by its version
    assert {name for name in told.keys() - names if not name.endswith(("vocab.json", "merges.txt"))} == set()
    assert told == {name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in told}


def test_shards_a_variant_and_another_vae(source: Path, tmp_path: Path) -> None:
    """The index of shards counts; the plain weights beside a variant and the VAE that is replaced do not."""
    vae = shutil.copytree(source / "vae", tmp_path / "vae")
    for component in ("unet", "text_encoder"):
        weights = next((source / component).glob("*.safetensors"))
        model = load.component(open_folder(source), component, torch.float16)
        model.save_pretrained(source / component, variant="fp16", max_shard_size="100KB")
        assert weights.exists() and len(list((source / component).glob("*fp16-0*"))) > 1
    order = ExportOrder(str(source), variant="fp16", vae=str(vae))
    told = order.requested("fp32").files
    with opened(source) as names, opened(vae) as of_vae:
        read_all(source, tmp_path, {"vae": str(vae)}, "fp16")
    named = names | {f"vae/{name}" for name in of_vae}
    weighty = {name for name in told if "safetensors" in name or name.endswith("/config.json")}
    assert weighty == {name for name in named if "safetensors" in name or name.endswith("/config.json")}
    assert "unet/diffusion_pytorch_model.safetensors.index.fp16.json" in weighty
    assert "unet/diffusion_pytorch_model.safetensors" not in told


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_shards_beside_weights_in_one_file(component: str, source: Path) -> None:
    """diffusers reads the shards then, transformers the one file."""
    (single,) = (source / component).glob("*.safetensors")
    data, checkpoint = single.read_bytes(), open_folder(source)
    load.component(checkpoint, component, torch.float32).save_pretrained(source / component, max_shard_size="100KB")
    single.write_bytes(data)
    checkpoint = open_folder(source)
    with opened(source) as names:
        load.component(checkpoint, component, torch.float32)
    told = {f"{component}/{path.name}" for path in part_files_read(source / component, None)}
    assert {n for n in names if n.endswith(".safetensors")} == {n for n in told if n.endswith(".safetensors")}


CHANGES: dict[str, Callable[[Path], object]] = {
    "model_index.json": lambda source: (source / "model_index.json").open("a").write("\n"),
    "scheduler/scheduler_config.json": lambda source: (source / "scheduler/scheduler_config.json").open("a").write(" "),
    "tokenizer/added_tokens.json": lambda source: (source / "tokenizer/added_tokens.json").write_text("{}"),
    "vae/config.json": lambda source: (source / "vae/config.json").open("a").write("\n"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_another_source(name: str, source: Path) -> None:
    before = files(source)
    CHANGES[name](source)
    after = files(source)
    assert {n for n in {*before, *after} if before.get(n) != after.get(n)} == {name}


def test_weights_of_equal_size_and_time_are_another_source(source: Path, tmp_path: Path) -> None:
    digests = Digests()
    path = source / "unet/diffusion_pytorch_model.safetensors"
    before, status, order = digests.record(path), path.stat(), ExportOrder(str(source))
    first = order.requested("fp32", digests).files
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.size, status.st_mtime_ns)
    second = order.requested("fp32", digests).files
    assert {n for n in first if first[n] != second[n]} == {"unet/diffusion_pytorch_model.safetensors"}


def test_a_copy_under_another_name_is_the_same_source(checkpoints: dict[str, Path], source: Path) -> None:
    for path in source.rglob("*"):
        os.utime(path)
    (source / ".DS_Store").write_text("x")
    (source / "README.md").write_text("x")
    (source / "in.bundle.partial/unet").mkdir(parents=True)
    (source / "in.bundle.partial/unet/config.json").write_text("{}")
    whole = [ExportOrder(str(path)).requested("fp32") for path in (checkpoints["sd"], source)]
    assert whole[0] == whole[1] and str(source.parent) not in json.dumps(vars(whole[1]))
    vaes = [ExportOrder("owner/name", vae=str(path / "vae")).requested("fp32") for path in (checkpoints["sd"], source)]
    assert vaes[0] == vaes[1] and {name.split("/")[0] for name in vaes[0].files} == {"vae"}
    assert ExportOrder("owner/name", vae="tiny").requested("fp32").files == {}


# --- what is remembered


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is old enough to be remembered."""
    monkeypatch.setattr(hashing, "SETTLED", -1)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for a digest."""
    read: list[Path] = []
    digest = hashing.digest

    def noting(path: Path, **options: object) -> str:
        read.append(path)
        return digest(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "digest", noting)
    return read


def test_a_file_is_read_once(old: Path, hashed: list[Path], tmp_path: Path) -> None:
    digests = Digests(tmp_path)
    assert digests.unread([old]) == 3
    record = digests.record(old)
    digests.save(tmp_path)
    later = Digests(tmp_path / "nowhere", tmp_path)
    assert later.record(old) == record and later.unread([old]) == 0 and hashed == [old]
    copy = Path(shutil.copy2(old, tmp_path / "copy"))  # the same size and time, and another file
    assert later.unread([copy]) == 3 and later.record(copy) == record and hashed == [old, copy]
    later.save(tmp_path)
    assert Digests(tmp_path).unread([old, copy]) == 0
    before = (tmp_path / MEMORY).stat().st_mtime_ns
    Digests(tmp_path).save(tmp_path)
    assert (tmp_path / MEMORY).stat().st_mtime_ns == before
    assert str(tmp_path) not in (tmp_path / MEMORY).read_text()


def test_a_replaced_file_is_read_again(old: Path, hashed: list[Path], tmp_path: Path) -> None:
    digests = Digests()
    first, times = digests.record(old), (old.stat().st_atime_ns, old.stat().st_mtime_ns)
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=times)
    other.rename(old)
    second = digests.record(old)
    assert second.sha256 == hashlib.sha256(b"two").hexdigest() != first.sha256 and len(hashed) == 2


def test_a_young_file_is_not_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path, digests = tmp_path / "file", Digests()
    path.write_bytes(b"one")
    assert digests.record(path) == digests.record(path) and hashed == [path, path]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\udcff"])
def test_a_damaged_memory_is_not_used(content: str, old: Path, tmp_path: Path) -> None:
    (tmp_path / MEMORY).write_bytes(content.encode(errors="surrogateescape"))
    digests = Digests(tmp_path)
    assert digests.record(old).sha256 == hashlib.sha256(b"one").hexdigest()
    digests.save(tmp_path)
    assert Digests(tmp_path).unread([old]) == 0


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file cannot be read: No such file"):
        Digests().record(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        Digests().record(tmp_path)
