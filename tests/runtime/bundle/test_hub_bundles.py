"""A bundle in the hub's cache, as huggingface_hub keeps it: found by its id, read through links, engines ignored."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ON, called, command
from here import build_here
from hub_cache import COMMIT, NAME, put
from PIL import Image

from turbochain.engines.backends import onnxruntime as onnxruntime_builder
from turbochain.engines.backends.contract import Compilation
from turbochain.runtime import Bundle, BundleError, Pipeline
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.backends import onnxruntime_sessions as sessions
from turbochain.runtime.backends.contract import Device, Opened
from turbochain.runtime.bundle import hashing, hub
from turbochain.runtime.bundle.manifest import Gpu

GRAPHS = ("text_encoder", "unet", "step", "vae_decoder")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache and the user's, both empty, with no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "home/hub"


@pytest.fixture
def snapshot(sd: Path, home: Path) -> Path:
    """The SD miniature in the hub's cache, with its engine."""
    return put(sd, home)


def tree(folder: Path) -> dict[str, tuple[int, bool]]:
    return {str(p): (p.lstat().st_mtime_ns, p.is_symlink()) for p in folder.rglob("*") if not p.is_dir()}


def drawn(bundle: Path | str, **options: object) -> np.ndarray:
    with Pipeline.load(bundle, **options) as pipe:  # type: ignore[arg-type]
        return pipe("a cat", seed=0, output_type="uint8").images


def generated(bundle: str, picture: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command("turbochain", "generate", bundle, "a cat", "-o", picture, *options)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.full)])
def test_a_snapshot_is_a_bundle(backend: str, sd: Path, snapshot: Path, home: Path) -> None:
    """Its engine is built in the user's cache, libraries read it, and the hub's cache stays as it was."""
    assert all(path.is_symlink() for path in snapshot.rglob("*") if not path.is_dir())
    before, bundle = tree(home), Bundle.open(snapshot)
    bundle.check_files(full=True)
    with pytest.raises(BundleError, match="engines that came with it from the hub are ignored without --trust-engines"):
        Pipeline.load(snapshot)
    made = build_here(str(snapshot), backend=backend, device="cpu", chains=["text-to-image"], quiet=True)
    assert made.folder.parent == hashing.user_cache() / "engines" / bundle.id
    expected = drawn(sd, engines=made.folder.parent)
    assert (drawn(snapshot) == expected).all() and tree(home) == before
    assert os.path.samefile(bundle.plain("unet") / "graphs/unet.fp32-0.data", snapshot / "graphs/unet.fp32-0.data")


def test_an_engines_own_form_of_a_graph_finds_its_data(snapshot: Path, tmp_path: Path) -> None:
    bundle, gpu = Bundle.open(snapshot), Device("cuda", 0, Gpu("NVIDIA L4", "8.9", 24 * 2**30))
    onnxruntime_builder.compile(Compilation(bundle, "unet", tmp_path, {}, gpu, tmp_path, lambda *_: None))
    options = sessions.default_options()
    form = onnxruntime.read_form(Opened(bundle, tmp_path, {}, gpu), "unet", options)
    session = sessions.load(form, "unet", options, sessions.CPU, {})
    sessions.check_ends(bundle.manifest.graphs["unet"], session)


def test_an_id_is_a_bundle(sd: Path, snapshot: Path, tmp_path: Path, home: Path) -> None:
    """Through the library itself; the engine that came with it runs only if it is trusted."""
    before, picture = tree(home), tmp_path / "a.png"
    done = generated(NAME, picture)
    assert done.returncode == 2 and f"without --trust-engines); build one: build-engine {snapshot}" in done.stderr
    done = generated(NAME, picture, "--trust-engines")
    assert done.returncode == 0, done
    assert (np.asarray(Image.open(picture)) == drawn(sd)[0]).all() and tree(home) == before
    build_here(str(snapshot), **ON, chains=["text-to-image"], quiet=True)
    shutil.rmtree(snapshot / "engines")
    assert generated(f"{NAME}@{COMMIT}", picture).returncode == 0
    code = "import sys; from turbochain.runtime import Pipeline; Pipeline.load(sys.argv[1]).close()\n"
    code += "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    done = subprocess.run([sys.executable, "-c", code, f"{NAME}@main"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done
    inspected = command("turbochain", "inspect", NAME)
    assert f"{snapshot}: sd, from" in inspected.stdout and "fits this machine" in inspected.stdout


def test_what_is_no_bundle_on_the_hub(checkpoints: dict[str, Path], snapshot: Path, home: Path, tmp_path: Path) -> None:
    shutil.rmtree(home)
    put(checkpoints["sd"], home)
    done = generated(NAME, tmp_path / "a.png")
    assert done.returncode == 2 and f"{NAME} on the hub is not a bundle; build one: build-engine {NAME}" in done.stderr
    for name in ("someone/else", f"{NAME}@v2"):
        done = generated(name, tmp_path / "a.png")
        said = f"{name.partition('@')[0]} is neither a folder here nor, as far as can be told, a bundle on the hub ("
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = called("turbochain", "inspect", NAME)
    assert done.returncode == 2 and "pip install 'turbochain[hub]'" in done.stderr


def test_what_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path object, a path that is there (also a dangling link), and what has no owner or more than one slash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/link").symlink_to("nowhere")
    (tmp_path / "owner/name").mkdir()
    others = ("name", "a/b/c", "/a/b", "./name", "../name", "a/", "a/b\n", "owner/name", "owner/link")
    for bundle in (Path(NAME), *others):
        assert hub.folder(bundle) == Path(bundle)
        with pytest.raises(BundleError):
            Bundle.open(bundle)


def to(target: str) -> Callable[[Path], None]:
    """Let the decoder's weights be a link."""

    def change(snapshot: Path) -> None:
        link = snapshot / "graphs/vae.fp32-0.data"
        link.unlink()
        link.symlink_to(target)

    return change


def chained(snapshot: Path) -> None:
    """A blob that is itself a link, to the same bytes elsewhere."""
    blob = (snapshot / "graphs/vae.fp32-0.data").resolve()
    outside = Path(shutil.copyfile(blob, snapshot.parents[3] / "outside"))
    blob.unlink()
    blob.symlink_to(outside)


def linked_store(snapshot: Path) -> None:
    """The blobs' folder is a link: whoever made it chose what the links lead to."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(snapshot.parents[3] / "elsewhere")
    blobs.symlink_to(snapshot.parents[3] / "elsewhere")


def below(snapshot: Path) -> None:
    """A folder among the blobs."""
    blob = (snapshot / "graphs/vae.fp32-0.data").resolve()
    (blob.parent / "more").mkdir()
    blob.rename(blob.parent / "more" / blob.name)
    to(f"../../../blobs/more/{blob.name}")(snapshot)


MALICIOUS = {
    "outside": (to("/etc/passwd"), "a symbolic link leads outside"),
    "beside the blobs": (to("../../../refs/main"), "a symbolic link leads outside"),
    "another snapshot": (to("../../other/file"), "a symbolic link leads outside"),
    "through the blobs": (to("../../../blobs/../refs/main"), "a symbolic link leads outside"),
    "a blob's folder": (below, "a symbolic link leads outside"),
    "a linked blob": (chained, "a symbolic link leads outside"),
    "linked blobs": (linked_store, "a symbolic link leads outside"),
    "another blob": (to(f"../../../blobs/{'0' * 64}"), "is missing"),
}


def test_a_path_below_a_folder_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"out/sd\.bundle"):
        Bundle.open("out/sd.bundle")


@pytest.mark.parametrize("case", MALICIOUS)
def test_links_that_lead_elsewhere(case: str, sd: Path, snapshot: Path) -> None:
    change, expected = MALICIOUS[case]
    change(snapshot)
    with pytest.raises(BundleError, match=expected):
        Pipeline.load(snapshot, engines=sd / "engines")


def test_a_blob_of_other_bytes(sd: Path, snapshot: Path) -> None:
    """A link to a blob of the same size is told by its hash."""
    blob = (snapshot / "graphs/vae.fp32-0.data").resolve()
    other = blob.with_name("1" * 64)
    other.write_bytes(bytes(blob.stat().st_size))
    to(f"../../../blobs/{other.name}")(snapshot)
    with pytest.raises(BundleError, match=r"'graphs/vae.fp32-0.data' is damaged"):
        Pipeline.load(snapshot, engines=sd / "engines")


def test_a_snapshot_folder_without_blobs_is_no_cache(sd: Path, home: Path, tmp_path: Path) -> None:
    shutil.copytree(sd, tmp_path / "snapshots/x.bundle")
    assert Bundle.open(tmp_path / "snapshots/x.bundle").trusts_engines
    drawn(tmp_path / "snapshots/x.bundle")


# --- what libraries read


def refuse(*_: object, **__: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_copy_is_hashed(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may have changed since the bundle was checked."""
    bundle = Bundle.open(snapshot)
    blob = (snapshot / "graphs/vae.fp32-0.data").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(BundleError, match=r"'graphs/vae.fp32-0.data' is damaged"):
        bundle.plain("vae_decoder")


def test_plain_files_are_made_once_and_mended(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(snapshot)
    file = "graphs/vae.fp32-0.data"
    target = bundle.plain("vae_decoder") / file
    first = target.stat()
    assert bundle.plain("vae_decoder") / file == target and os.path.samestat(first, target.stat())
    target.unlink()
    target.symlink_to(snapshot / file)
    bundle.plain("vae_decoder")
    assert not target.is_symlink() and os.path.samefile(target, snapshot / file)
    target.unlink()
    target.write_bytes(b"cut off")
    monkeypatch.setattr(os, "link", refuse)
    bundle.plain("vae_decoder")
    assert target.read_bytes() == (snapshot / file).read_bytes() and not os.path.samefile(target, snapshot / file)
    copied = target.stat()
    bundle.plain("vae_decoder")
    assert os.path.samestat(copied, target.stat())


def test_another_bundle_is_read_where_it_lies(sd: Path) -> None:
    assert {Bundle.open(sd).plain(graph) for graph in GRAPHS} == {sd}
