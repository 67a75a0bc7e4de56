"""A graph whose hash is known is not searched again for the files that it opens; what is kept may be damaged."""

import hashlib

import onnx
import pytest
from external_models import external, model_of, refused, write_bundle

from turbochain.runtime.bundle.external_data import check_external
from turbochain.runtime.errors import BundleError


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "turbochain" / "hashes"


@pytest.fixture
def stamped(bundle, cache):
    """The SHA-256 of a sound graph that was checked once."""
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], sha256)
    return sha256


def test_a_graph_is_not_read_again_once_its_hash_is_known(bundle, stamped):
    (bundle / "graphs" / "m.onnx").write_bytes(b"\xff")
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    assert "is not an ONNX model" in refused(bundle, "graphs/w.data")  # nobody vouches for the hash
    with pytest.raises(BundleError, match="is not an ONNX model"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], "0" * 64)


def test_a_known_hash_does_not_excuse_what_is_refused_here(bundle, stamped, tmp_path):
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", ["graphs/other"], stamped)
    (bundle / "graphs" / "w.data").unlink()
    (bundle / "graphs" / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="a symbolic link leads outside"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    (bundle / "graphs" / "m.onnx").rename(bundle / "real.onnx")
    (bundle / "graphs" / "m.onnx").symlink_to("../real.onnx")
    with pytest.raises(BundleError, match="behind a symbolic link"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no checksum": lambda text: text.splitlines()[0] + "\n",
    "no location": lambda text: text.replace('"w.data"', ""),
    "another location": lambda text: text.replace("w.data", "v.data"),
    "another version": lambda text: text.replace("[1,", "[0,"),
    "not JSON": lambda text: "{" * 100_000,
    "another shape": lambda text: "7\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stamp_is_not_used(bundle, cache, stamped, damage):
    (stamp,) = cache.iterdir()
    sound = stamp.read_text()
    stamp.write_text(DAMAGES[damage](sound))
    assert stamp.read_text() != sound
    path = bundle / "graphs" / "m.onnx"
    graph = path.read_bytes()
    path.write_bytes(b"\xff")
    with pytest.raises(BundleError, match="is not an ONNX model"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data", "graphs/v.data"], stamped)
    path.write_bytes(graph)
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    assert stamp.read_text() == sound


def test_the_stamp_of_another_graph_is_not_used(bundle, cache, stamped):
    (stamp,) = cache.iterdir()
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("secret")), path)
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    stamp.rename(stamp.with_name(stamp.name.replace(stamped, other)))
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], other)


def test_only_a_sound_graph_with_that_hash_is_stamped(bundle, cache):
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"])
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], "0" * 64)  # as if it changed after it was verified
    with pytest.raises(BundleError):
        check_external(bundle, "graphs/m.onnx", [], hashlib.sha256(path.read_bytes()).hexdigest())
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_not_used(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], digest)
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", [], digest)
    assert (tmp_path / "file").read_text() == ""


def test_an_opened_bundle_uses_the_stamps_unless_full(opened, cache):
    opened.check_files(full=True)
    assert not list(cache.glob("*.external"))
    opened.check_files()
    expected = {
        hashlib.sha256((opened.path / g.file).read_bytes()).hexdigest() for g in opened.manifest.graphs.values()
    }
    assert {stamp.stem for stamp in cache.glob("*.external")} == expected
