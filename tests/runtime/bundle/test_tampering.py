"""A bundle that is not what was built: refused before anything of it is used, with every problem named."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from conftest import called
from tampering import (
    DECODER,
    TABLE,
    UNET,
    cut,
    drop,
    edit_json,
    engine_json,
    flip,
    put,
    refit,
    refusal,
    rehash,
    together,
)

from turbochain.runtime import Bundle, BundleError, Pipeline
from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.manifest import Engine
from turbochain.runtime.checks import verify


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "there is no such folder; build one: build-engine SOURCE" in refusal(tmp_path / "none")
    assert "it has no bundle.json; build-engine makes one" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "it is a file; build one: build-engine SOURCE" in refusal(tmp_path / "file")


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (cut, "is truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is too long"),
    "bit flipped": (flip, "is damaged"),
}
READ = (
    "tokenizer.json",
    TABLE,
    *(f"graphs/{g}.onnx" for g in ("text_encoder", "unet", "step", "step+guidance", "vae_decoder")),
    *(f"graphs/{c}.data" for c in ("text_encoder.fp32-0", "text_encoder.onnx", "unet.fp32-0", "vae.fp32-0")),
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_not_loaded(sd: Path, copy_of, name: str, damage: str) -> None:
    bundle, (break_, expected) = copy_of(sd), DAMAGES[damage]
    break_(bundle / name)
    message = refusal(bundle)
    assert f"{name!r} {expected}" in message and "remove it and run build-engine SOURCE again" in message


def test_every_listed_file_is_checked_in_full(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    names = list(Bundle.open(bundle).manifest.files)
    for name in names:
        flip(bundle / name)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle).check_files(full=True)
    assert f"{len(names)} files are not what the manifest says" in str(caught.value)
    assert all(f"{name!r} is damaged" in str(caught.value) for name in names)


def test_every_file_on_disk_is_listed(sd: Path) -> None:
    on_disk = {str(p.relative_to(sd)) for p in sd.rglob("*") if p.is_file()}
    listed = {"bundle.json", "source.json", *Bundle.open(sd).manifest.files}
    assert {name for name in on_disk if not name.startswith("engines/")} == listed


@pytest.mark.parametrize("names", [("unet.onnx", "vae_decoder.onnx"), ("unet.fp32-0.data", "vae.fp32-0.data")])
def test_two_files_exchanged(sd: Path, copy_of, names: tuple[str, str]) -> None:
    bundle = copy_of(sd)
    one, other = (bundle / "graphs" / name for name in names)
    spare = bundle / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    message = refusal(bundle)
    assert all(f"graphs/{name}" in message for name in names)


def test_a_folder_or_link_in_the_place_of_a_file(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    path = bundle / "graphs/unet.onnx"
    path.unlink()
    path.mkdir()
    assert "'graphs/unet.onnx' is not a regular file" in refusal(bundle)
    path.rmdir()
    path.symlink_to(sd / "graphs/unet.onnx")
    assert "a symbolic link leads outside" in refusal(bundle)


def point_to(location: str) -> Callable[[Path], None]:
    """Make the decoder read one initializer from `location`."""

    def tamper(bundle: Path) -> None:
        path = bundle / "graphs/vae_decoder.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data)
        entry = next(e for e in tensor.external_data if e.key == "location")
        entry.value = location.format(bundle=bundle)
        path.write_bytes(model.SerializeToString())

    return tamper


def link_outside(bundle: Path) -> None:
    (bundle.parent / "outside.data").write_bytes((bundle / "graphs/vae.fp32-0.data").read_bytes())
    (bundle / "graphs/link.data").symlink_to(bundle.parent / "outside.data")
    point_to("link.data")(bundle)
    record = vars(hashing.describe(bundle / "graphs/link.data"))
    edits = (put("files", "graphs/link.data", value=record), put(*DECODER, "data", value=["graphs/link.data"]))
    edit_json(bundle / "bundle.json", together(*edits))


EXTERNAL = {
    "absolute": (point_to("/etc/passwd"), "reads a file outside"),
    "absolute, inside": (point_to("{bundle}/graphs/vae.fp32-0.data"), "reads a file outside"),
    "above": (point_to("../../secret"), "reads a file outside"),
    "above and back": (point_to("../../sd-fp32.bundle/graphs/vae.fp32-0.data"), "reads a file outside"),
    "link": (link_outside, "a symbolic link leads outside"),
    "of another graph": (point_to("unet.fp32-0.data"), "which the manifest does not list"),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_a_graph_that_reads_elsewhere(sd: Path, copy_of, case: str) -> None:
    bundle, (tamper, expected) = copy_of(sd), EXTERNAL[case]
    tamper(bundle)
    rehash(bundle, "graphs/vae_decoder.onnx")
    refit(bundle)
    assert expected in refusal(bundle)


def test_a_graph_that_is_no_onnx(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    (bundle / "graphs/unet.onnx").write_bytes(b"\xff" * 100)
    rehash(bundle, "graphs/unet.onnx")
    refit(bundle)
    assert "graphs/unet.onnx" in refusal(bundle)


def test_a_graph_that_is_not_what_the_manifest_says(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    chains = Bundle.open(sd).manifest.chains
    sizes = (put("chains", name, "size", value=[64, 128]) for name in chains)
    edits = (put(*DECODER, "outputs", 0, "shape", value=[1, 64, 128, 3]), *sizes)
    edit_json(bundle / "bundle.json", together(*edits))
    message = refusal(bundle)
    assert "graphs/vae_decoder.onnx" in message and "[1, 64, 64, 3]" in message and "[1, 64, 128, 3]" in message


ENGINE_EDITS = {
    "another version": (put("key", "version", value="0.0.1"), "it was built with onnxruntime 0.0.1"),
    "another library": (put("key", "library", value="onnxruntime-gpu"), "it was built with onnxruntime-gpu"),
    "another device": (put("key", "device", value="sm_90"), "it is for sm_90, and this device is cpu"),
    "another backend": (put("key", "backend", value="abacus"), "the backend abacus, which this version does not have"),
    "no backend": (put("key", "backend", value="host"), "the backend host, which this version does not have"),
    "other graphs": (put("graphs", "unet", "digest", value="00"), "it was built from other graphs"),
    "fewer graphs": (drop("graphs", "unet"), "it lacks unet of the chain text-to-image"),
    "unknown key": (put("speed", value=1), "the top level has the unknown key 'speed'"),
    "missing key": (drop("key", "device"), "key lacks the key 'device'"),
    "newer format": (put("format_version", value=9), "format version 9"),
    "older format": (put("format_version", value=1), "format version 1"),
}


@pytest.mark.parametrize("case", ENGINE_EDITS)
def test_an_engine_that_does_not_fit(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), ENGINE_EDITS[case]
    edit_json(engine_json(bundle), edit)
    message = refusal(bundle)
    assert expected in message and message.endswith(f"build one: build-engine {bundle}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_engine_whose_manifest_is_damaged(sd: Path, copy_of, text: str) -> None:
    bundle = copy_of(sd)
    engine_json(bundle).write_text(text)
    message = refusal(bundle)
    assert "engine.json" in message and message.endswith(f"build one: build-engine {bundle}")


def test_an_engines_options_and_files(sd: Path) -> None:
    """What the verification settled holds in place of what the key has, and every graph's files are the engine's."""
    (engine,) = Bundle.open(sd).engines().values()
    assert isinstance(engine, Engine)
    record = hashing.FileRecord(1, "0" * 64)
    graphs = {name: replace(graph, files={f"{name}.engine": record}) for name, graph in engine.graphs.items()}
    options = {"inference_precision": "auto", "threads": 1}
    changed = replace(
        engine, graphs=graphs, key=replace(engine.key, options=options), settled={"inference_precision": "fp32"}
    )
    assert changed.options == {"inference_precision": "fp32", "threads": 1}
    assert changed.files == {f"{name}.engine": record for name in engine.graphs} and len(engine.graphs) > 1


def test_an_engine_that_is_being_built_is_not_there_yet(sd: Path, copy_of) -> None:
    path = copy_of(sd)
    (engine,) = Bundle.open(path).engines()
    (path / "engines" / engine).rename(path / "engines" / f".{engine}")
    assert Bundle.open(path).engines() == {}


def test_no_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    shutil.rmtree(bundle / "engines")
    assert refusal(bundle).endswith(f"(it has none); build one: build-engine {bundle}")


@pytest.mark.parametrize("name", ["plan.bin", "../../../plan.bin"])
def test_a_file_of_an_engine(sd: Path, copy_of, name: str) -> None:
    bundle = copy_of(sd)
    edit_json(engine_json(bundle), put("graphs", "unet", "files", name, value={"size": 1, "sha256": "0" * 64}))
    expected = "is not a path inside" if name.startswith(".") else "is missing"
    assert f"{name!r} {expected}" in refusal(bundle)
    with pytest.raises(BundleError, match=f"'{re.escape(name)}' {expected}"):
        verify.verify_bundle(bundle)


def test_a_second_engine_that_fits_serves(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine = engine_json(bundle)
    shutil.copytree(engine.parent, engine.parent.with_name("other"))
    engine.write_text("{")
    with Pipeline.load(bundle) as pipe:
        assert pipe.engine_name == "other"


COMMANDS = {
    "manifest": (lambda b: edit_json(b / "bundle.json", put("speed", value=1)), "unknown key 'speed'", "gvi"),
    "newer": (lambda b: edit_json(b / "bundle.json", put("format_version", value=3)), "format version 3", "gvi"),
    "older": (lambda b: edit_json(b / "bundle.json", put("format_version", value=1)), "build it again with", "gvi"),
    "tables": (lambda b: flip(b / TABLE), f"'{TABLE}' is damaged", "gvi"),
    "not JSON": (lambda b: (b / "bundle.json").write_text("{"), "cannot be read", "gvi"),
    "wiring": (lambda b: edit_json(b / "bundle.json", drop(*UNET)), "the graph unet, which the bundle lacks", "gvi"),
    "bit": (lambda b: flip(b / "graphs/unet.fp32-0.data"), "'graphs/unet.fp32-0.data' is damaged", "gv"),
    "reference": (lambda b: flip(b / "reference.safetensors"), "'reference.safetensors' is damaged", "v"),
    "licence": (lambda b: (b / "LICENSE").unlink(), "'LICENSE' is missing", "v"),
    "engine": (lambda b: engine_json(b).write_text("{"), "has no engine for this machine", "gv"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_commands_refuse(sd: Path, copy_of, tmp_path: Path, case: str) -> None:
    bundle, (tamper, expected, which) = copy_of(sd), COMMANDS[case]
    tamper(bundle)
    picture = tmp_path / "out.png"
    lines = {
        "g": ("generate", bundle, "a cat", "-o", picture),
        "v": ("verify", bundle, "--json"),
        "i": ("inspect", bundle),
    }
    for letter in which:
        done = called("turbochain", *lines[letter])
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("turbochain: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert expected in done.stderr
    assert not picture.exists()


def test_inspect_shows_a_damaged_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine_json(bundle).write_text("{")
    done = called("turbochain", "inspect", bundle, "--json")
    (engine,) = json.loads(done.stdout)["engines"].values()
    assert done.returncode == 0 and not engine["fits"] and "cannot be read" in engine["reason"]
