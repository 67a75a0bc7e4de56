"""A bundle that is not what was built: refused before anything of it is used, with every problem named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import command

from turbochain.runtime import Bundle, BundleError, Pipeline
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.manifest import Engine, Manifest

CHAIN = "text-to-image"
Edit = Callable[[dict[str, Any]], object]


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def put(*keys: str | int, value: Any) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return edit


def together(*edits: Edit) -> Edit:
    return lambda value: [edit(value) for edit in edits]


def rehash(bundle: Path, *names: str) -> None:
    """Make bundle.json say what the files are now."""
    records = {name: vars(hashing.describe(bundle / name)) for name in names}
    edit_json(bundle / "bundle.json", lambda m: m["files"].update(records))


def engine_json(bundle: Path) -> Path:
    (found,) = bundle.glob("engines/*/engine.json")
    return found


def refusal(bundle: Path) -> str:
    """What Pipeline.load says, as one line."""
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


UNET, DECODER = ("graphs", "unet"), ("graphs", "vae_decoder")
MANIFEST_EDITS = {
    "unknown key": (put("speed", value="fast"), "the top level has the unknown key 'speed'"),
    "unknown nested key": (put(*UNET, "speed", value=1), "graphs.unet has the unknown key 'speed'"),
    "unknown key in a row": (
        put("chains", CHAIN, "schedules", "2", "rows", 1, "d", value=0.0),
        f"chains.{CHAIN}.schedules.2.rows[1] has the unknown key 'd'",
    ),
    "missing key": (drop("family"), "the top level lacks the key 'family'"),
    "missing nested key": (drop("chains", CHAIN, "carry"), "chains.text-to-image lacks the key 'carry'"),
    "text for a number": (
        put("chains", CHAIN, "schedules", "1", "q", value="14"),
        f'chains.{CHAIN}.schedules.1.q should be float, and is "14"',
    ),
    "true for a number": (put(*UNET, "opset", value=True), "graphs.unet.opset should be int, and is true"),
    "number for text": (put("created", value=3), "created should be str, and is 3"),
    "object for a list": (put(*UNET, "data", value={}), "graphs.unet.data should be tuple"),
    "list for an object": (put("graphs", value=[]), "graphs should be dict, and is []"),
    "null": (put("files", value=None), "files should be dict, and is null"),
    "newer format": (
        together(put("format_version", value=2), put("from the future", value=1)),
        "format version 2, and this turbochain reads up to 1: pip install --upgrade turbochain",
    ),
    "older format": (put("format_version", value=0), "format"),
    "format of a wrong type": (put("format_version", value="2"), 'format_version should be int, and is "2"'),
    "no chain": (put("chains", value={}), "there is no chain 'text-to-image'"),
    "graph that is not there": (
        drop(*UNET),
        "chain text-to-image names the graph unet, which the bundle lacks",
    ),
    "name produced twice": (
        put(*DECODER, "outputs", 0, "name", value="next_latents"),
        "next_latents is produced twice, by unet and vae_decoder",
    ),
    "name produced and fed": (
        lambda m: m["chains"][CHAIN]["inputs"].append("image"),
        "image is produced twice, by the caller and vae_decoder",
    ),
    "input without a source": (
        lambda m: m["chains"][CHAIN]["step_inputs"].remove("noise"),
        "the input noise of unet has no source",
    ),
    "input that a later graph makes": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="image"),
        "the input image of text_encoder has no source",
    ),
    "input that only a step has": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="noise"),
        "the input noise of text_encoder has no source",
    ),
    "input that only the loop has": (
        put("graphs", "text_encoder", "inputs", 0, "name", value="time_projections"),
        "the input time_projections of text_encoder has no source",
    ),
    "no graph of the time": (
        drop("graphs", "time"),
        "chain text-to-image names the graph time, which the bundle lacks",
    ),
    "nothing runs at load": (
        drop("chains", CHAIN, "once"),
        "the input time_projections of unet has no source; chain text-to-image: nothing reads the fed input "
        "timestep_embedding",
    ),
    "a graph at load that reads no column": (
        put("graphs", "time", "inputs", 0, "name", value="latents"),
        "the input latents of time has no source",
    ),
    "a graph at load that reads another's output": (
        put("graphs", "time", "inputs", 0, "name", value="time_projections"),
        "the input time_projections of time has no source",
    ),
    "a column that is made and fed": (
        put("graphs", "time", "outputs", 0, "name", value="a"),
        "a is produced twice, by the caller and time",
    ),
    "fed and not read": (
        lambda m: m["chains"][CHAIN]["inputs"].append("mask"),
        "nothing reads the fed input mask",
    ),
    "shapes of two ends": (
        put(*DECODER, "inputs", 0, "shape", value=[1, 4, 8, 9]),
        "next_latents is float32[1, 4, 8, 8] in unet and float32[1, 4, 8, 9] in vae_decoder",
    ),
    "dtypes of two ends": (
        put(*DECODER, "inputs", 0, "dtype", value="float16"),
        "next_latents is float32[1, 4, 8, 8] in unet and float16[1, 4, 8, 8] in vae_decoder",
    ),
    "shapes across the loop": (
        put(*UNET, "inputs", 0, "shape", value=[1, 4, 8, 9]),
        "carry next_latents → latents joins tensors of different dtype or shape",
    ),
    "carry from nowhere": (put("chains", CHAIN, "carry", value={"x": "latents"}), "carry x → latents does not join"),
    "nothing carried": (put("chains", CHAIN, "carry", value={}), "carr"),
    "dtype unknown": (put(*UNET, "inputs", 0, "dtype", value="object"), "graph unet: latents has dtype object"),
    "size zero": (put(*DECODER, "outputs", 0, "shape", value=[0, 64, 64, 3]), "image has dtype uint8 and shape [0,"),
    "no output": (put("chains", CHAIN, "output", value="film"), "no graph produces its output film"),
    "output that is no picture": (put("chains", CHAIN, "output", value="prompt_embeds"), "prompt_embeds"),
    "precision unknown": (put(*UNET, "precision", value="fp4"), "fp4"),
    "row too few": (
        lambda m: m["chains"][CHAIN]["schedules"]["2"]["rows"].pop(),
        "the schedule for 2 steps has 1 rows",
    ),
    "row too many": (
        lambda m: m["chains"][CHAIN]["schedules"]["1"]["rows"].extend(m["chains"][CHAIN]["schedules"]["2"]["rows"]),
        "the schedule for 1 steps has 3 rows",
    ),
    "no schedule": (put("chains", CHAIN, "schedules", value={}), "schedule"),
    "short timestep embedding": (
        lambda m: m["chains"][CHAIN]["schedules"]["1"]["rows"][0]["timestep_embedding"].pop(),
        "timestep_embedding",
    ),
    "NaN in a schedule": (put("chains", CHAIN, "schedules", "1", "rows", 0, "a", value=float("nan")), "NaN"),
    "file that is not listed": (
        put(*UNET, "file", value="graphs/other.onnx"),
        "graph unet names graphs/other.onnx, which is not in files",
    ),
    "file outside": (
        together(
            put("tokenizers", "input_ids", "file", value="../x"),
            put("files", "../x", value={"size": 1, "sha256": ""}),
        ),
        "'../x' is not a path inside the bundle",
    ),
    "no tokenizer": (put("tokenizers", value={}), "input_ids"),
    "prompt length": (put("tokenizers", "input_ids", "max_length", value=10), "10"),
    "padding": (put("tokenizers", "input_ids", "pad_id", value=7), "the bundle says 7"),
}


@pytest.mark.parametrize("case", MANIFEST_EDITS)
def test_a_manifest_that_is_not_sound(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), MANIFEST_EDITS[case]
    edit_json(bundle / "bundle.json", edit)
    assert expected in refusal(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bundle"', "[" * 100_000, "\ud800"])
def test_a_manifest_that_is_no_json_object(sd: Path, copy_of, text: str) -> None:
    bundle = copy_of(sd)
    (bundle / "bundle.json").write_text(text, "utf-8", "surrogatepass")
    assert str(bundle / "bundle.json") in refusal(bundle)


def test_every_problem_of_a_manifest_is_listed(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    edits = (put("speed", value=1), drop("family"), put("created", value=3), put(*UNET, "opset", value="x"))
    edit_json(bundle / "bundle.json", together(*edits))
    message = refusal(bundle)
    assert all(word in message for word in ("'speed'", "'family'", "created should be", "graphs.unet.opset"))
    shutil.copy(sd / "bundle.json", bundle)
    wiring = (
        put(*DECODER, "outputs", 0, "name", value="film"),
        lambda m: m["chains"][CHAIN]["step_inputs"].remove("noise"),
        lambda m: m["chains"][CHAIN]["schedules"]["2"]["rows"].pop(),
    )
    edit_json(bundle / "bundle.json", together(*wiring))
    message = refusal(bundle)
    assert all(word in message for word in ("its output image", "input noise of unet", "schedule for 2 steps"))


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "there is no such folder; build one: build-engine SOURCE" in refusal(tmp_path / "none")
    assert "it has no bundle.json" in refusal(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """One bit in the middle, size and times as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (cut, "is truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is too long"),
    "bit flipped": (flip, "is damaged"),
}
READ = (
    "tokenizer.json",
    *(f"graphs/{g}.onnx" for g in ("text_encoder", "time", "unet", "vae_decoder")),
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
    listed = {"bundle.json", *Bundle.open(sd).manifest.files}
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
    "above and back": (point_to("../../sd-1-fp32.bundle/graphs/vae.fp32-0.data"), "reads a file outside"),
    "link": (link_outside, "a symbolic link leads outside"),
    "of another graph": (point_to("unet.fp32-0.data"), "which the manifest does not list"),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_a_graph_that_reads_elsewhere(sd: Path, copy_of, case: str) -> None:
    bundle, (tamper, expected) = copy_of(sd), EXTERNAL[case]
    tamper(bundle)
    rehash(bundle, "graphs/vae_decoder.onnx")
    edit_json(engine_json(bundle), put("key", "graphs", value=Bundle.open(bundle).graph_digests()))
    assert expected in refusal(bundle)


def test_a_graph_that_is_no_onnx(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    (bundle / "graphs/unet.onnx").write_bytes(b"\xff" * 100)
    rehash(bundle, "graphs/unet.onnx")
    edit_json(engine_json(bundle), put("key", "graphs", value=Bundle.open(bundle).graph_digests()))
    assert "graphs/unet.onnx" in refusal(bundle)


def test_a_graph_that_is_not_what_the_manifest_says(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    edit_json(bundle / "bundle.json", put(*DECODER, "outputs", 0, "shape", value=[1, 64, 128, 3]))
    message = refusal(bundle)
    assert "graphs/vae_decoder.onnx" in message and "[1, 64, 64, 3]" in message and "[1, 64, 128, 3]" in message


ENGINE_EDITS = {
    "another version": (put("key", "version", value="0.0.1"), "it was built with onnxruntime 0.0.1"),
    "another library": (put("key", "library", value="onnxruntime-gpu"), "it was built with onnxruntime-gpu"),
    "another device": (put("key", "device", value="sm_90"), "it is for sm_90, and this device is cpu"),
    "another backend": (put("key", "backend", value="abacus"), "the backend abacus, which this version does not have"),
    "no backend": (put("key", "backend", value="host"), "the backend host, which this version does not have"),
    "other graphs": (put("key", "graphs", "unet", value="00"), "it was built from other graphs"),
    "unknown key": (put("speed", value=1), "the top level has the unknown key 'speed'"),
    "missing key": (drop("key", "device"), "key lacks the key 'device'"),
    "newer format": (put("format_version", value=9), "format version 9"),
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


def test_no_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    shutil.rmtree(bundle / "engines")
    assert refusal(bundle).endswith(f"(it has none); build one: build-engine {bundle}")


@pytest.mark.parametrize("name", ["plan.bin", "../../../plan.bin"])
def test_a_file_of_an_engine(sd: Path, copy_of, name: str) -> None:
    bundle = copy_of(sd)
    edit_json(engine_json(bundle), put("files", name, value={"size": 1, "sha256": "0" * 64}))
    expected = "is not a path inside" if name.startswith(".") else "is missing"
    assert f"{name!r} {expected}" in refusal(bundle)


def test_a_second_engine_that_fits_serves(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine = engine_json(bundle)
    shutil.copytree(engine.parent, engine.parent.with_name("other"))
    engine.write_text("{")
    with Pipeline.load(bundle) as pipe:
        assert pipe.engine_name == "other"


COMMANDS = {
    "manifest": (lambda b: edit_json(b / "bundle.json", put("speed", value=1)), "unknown key 'speed'", "gvi"),
    "newer": (lambda b: edit_json(b / "bundle.json", put("format_version", value=2)), "format version 2", "gvi"),
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
        done = command("turbochain", *lines[letter])
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("turbochain: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert expected in done.stderr
    assert not picture.exists()


def test_inspect_shows_a_damaged_engine(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    engine_json(bundle).write_text("{")
    done = command("turbochain", "inspect", bundle, "--json")
    (engine,) = json.loads(done.stdout)["engines"].values()
    assert done.returncode == 0 and not engine["fits"] and "cannot be read" in engine["reason"]


def test_the_reader_gives_back_what_was_written(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    for bundle in (sd, sdxl):
        for kind, path in ((Manifest, bundle / "bundle.json"), (Engine, engine_json(bundle))):
            value = strict_json.read(kind, path)
            again.write_text(strict_json.write(value))
            assert strict_json.read(kind, again) == value and again.read_text() == path.read_text()
