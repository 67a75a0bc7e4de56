"""An engine of several chains: which graphs are compiled, kept and dropped, and which chains are verified."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ON, ON_ARGUMENTS, called, command
from here import build_here
from second_chain import FIRST, GRAPH, SECOND, add_second_chain, edit_json, record

from turbochain.engines import BuildResult
from turbochain.runtime import Bundle, BundleError, InputError, Pipeline, VerificationError
from turbochain.runtime.backends import openvino
from turbochain.runtime.bundle import hashing, strict_json, writing
from turbochain.runtime.bundle.manifest import Engine

BUILD = Path(sys.executable).with_name("build-engine")
GRAPHS = ("text_encoder", "unet", "step", "step+guidance", "vae_decoder")
OF_IMAGES = ("vae_encoder", "start")
INT8: dict[str, Any] = {"options": {"int8": "vae"}, "quiet": True, **ON}
AHEAD: dict[str, Any] = {"backend": "tensorrt", "target": "sm89", "quiet": True}


def phases(result: BuildResult) -> list[str]:
    return [phase.name for phase in result.phases]


def engine_of(result: BuildResult) -> Engine:
    return strict_json.read(Engine, result.folder / "engine.json")


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != "engine.json"}


@pytest.fixture
def bundle(sd: Path, copy_of: Callable[[Path], Path]) -> Path:
    """The SD miniature without an engine, and with text-to-image alone."""
    copy = copy_of(sd)
    shutil.rmtree(copy / "engines")
    edit_json(copy / "bundle.json", lambda m: m["chains"].pop("image-to-image"))
    edit_json(copy / "bundle.json", lambda m: [m["graphs"].pop(name) for name in OF_IMAGES])
    return copy


def test_a_chain_that_is_added(bundle: Path) -> None:
    """Nothing of the first is compiled or verified again, and the engine says what it lacks until then."""
    before = build_here(str(bundle), quiet=True, **ON)
    assert phases(before) == [*(f"compile {g}" for g in GRAPHS), f"verify {FIRST}"]
    add_second_chain(bundle)
    with pytest.raises(BundleError, match=rf"it lacks {GRAPH} of the chain {SECOND}\); build one: build-engine "):
        Pipeline.load(bundle, chain=SECOND)
    with Pipeline.load(bundle) as pipe:
        first = pipe("a cat", seed=0, output_type="uint8").images
    after = build_here(str(bundle), quiet=True, **ON)
    assert phases(after) == [f"compile {GRAPH}", f"verify {SECOND}"] and after.folder == before.folder
    old, new = before.build_seconds, after.build_seconds
    assert {g: new[g] for g in GRAPHS} == old and {*new} == {*GRAPHS, GRAPH}
    assert after.checks[FIRST] == before.checks[FIRST] and all(c.passed for c in after.checks[SECOND])
    with Pipeline.load(bundle, chain=SECOND) as pipe:
        assert (pipe("a cat", seed=0, chain=SECOND, output_type="uint8").images == first).all()
        assert (pipe("a cat", seed=0, output_type="uint8").images == first).all()
    assert phases(build_here(str(bundle), quiet=True, **ON)) == []
    assert [p.name for p in (bundle / "engines").iterdir()] == [after.engine]


def test_the_chains_that_are_asked_for(bundle: Path) -> None:
    add_second_chain(bundle)
    only = build_here(str(bundle), chains=[FIRST], quiet=True, **ON)
    assert phases(only) == [*(f"compile {g}" for g in GRAPHS), f"verify {FIRST}"]
    assert {*only.precision} == {*GRAPHS} and {*only.checks} == {FIRST}
    done = command("build-engine", bundle, "--chains", SECOND, *ON_ARGUMENTS)
    assert done.returncode == 0 and "compile unet" not in done.stderr and f"compile {GRAPH}" in done.stderr, done
    assert f"chain {FIRST}\nstage " in done.stdout and f"chain {SECOND}\nstage " in done.stdout
    again = called("build-engine", bundle, "--chains", f"{FIRST},{SECOND}", *ON_ARGUMENTS)
    assert "nothing to do: it is built and verified already" in again.stdout
    for wrong in ("third", f"{FIRST},third"):
        refused = called("build-engine", bundle, "--chains", wrong, *ON_ARGUMENTS)
        assert refused.returncode == 2 and f"no chain third in {bundle}: choose --chains from " in refused.stderr
        assert f"{FIRST}, {SECOND}" in refused.stderr
    for wrong_type in ([], FIRST):
        with pytest.raises(InputError, match="a list of names was expected"):
            build_here(str(bundle), chains=wrong_type, quiet=True, **ON)


def test_a_chain_that_fails_leaves_the_engine_as_it_was(bundle: Path) -> None:
    before = build_here(str(bundle), quiet=True, **ON)
    text = (before.folder / "engine.json").read_text()
    add_second_chain(bundle, off=128)
    with pytest.raises(VerificationError, match=rf"^chain {SECOND}: the result differs .*max_abs is"):
        build_here(str(bundle), quiet=True, **ON)
    assert [p.name for p in (bundle / "engines").iterdir()] == [before.engine]
    assert (before.folder / "engine.json").read_text() == text
    assert phases(build_here(str(bundle), chains=[FIRST], quiet=True, **ON)) == []


def test_unchanged_files_are_linked_and_others_compiled(bundle: Path) -> None:
    """With files: the forms of the VAE in int8. A graph is added, changes, and goes."""
    before = build_here(str(bundle), **INT8)
    forms = inodes(before.folder)
    add_second_chain(bundle)
    after = build_here(str(bundle), **INT8)
    assert phases(after) == [f"compile {GRAPH}", f"verify {SECOND}"]
    assert inodes(after.folder) == forms and {(after.folder / form).stat().st_nlink for form in forms} == {1}
    hashing.check_all(after.folder, engine_of(after).files, full=True)

    digest = engine_of(after).graphs[GRAPH].digest
    graph = bundle / f"graphs/{GRAPH}.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x12\x04test")  # its producer's name
    record(bundle, f"graphs/{GRAPH}.onnx")
    changed = build_here(str(bundle), **INT8)
    assert phases(changed) == [f"compile {GRAPH}", f"verify {SECOND}"] and inodes(changed.folder) == forms
    assert engine_of(changed).graphs[GRAPH].digest != digest

    edit_json(bundle / "bundle.json", lambda m: (m["chains"].pop(SECOND), m["graphs"].pop(GRAPH)))
    dropped = build_here(str(bundle), **INT8)
    assert phases(dropped) == [] and {*dropped.precision} == {*GRAPHS} and {*dropped.checks} == {FIRST}
    assert {*engine_of(dropped).graphs} == {*GRAPHS} and inodes(dropped.folder) == forms

    damaged = dropped.folder / min(forms)
    text = damaged.read_bytes()
    damaged.write_bytes(text[:-1] + b" ")
    mended = build_here(str(bundle), **INT8)
    assert phases(mended) == ["compile vae_decoder", f"verify {FIRST}"]
    assert (mended.folder / damaged.name).read_bytes() == text


def test_an_engine_for_another_machine_gets_a_chain(bundle: Path) -> None:
    """Serialized engines: each keeps its inode, as do kernels that a load left, and nothing is verified here."""
    first = build_here(str(bundle), options={"builder_optimization_level": 0}, **AHEAD)
    files = inodes(first.folder)
    assert {*files} == {f"{g}.engine" for g in GRAPHS} and first.checks == {}
    add_second_chain(bundle)
    edit_json(bundle / "bundle.json", lambda m: m["chains"][SECOND]["stages"].pop())  # TensorRT reads no uint8
    edit_json(bundle / "bundle.json", lambda m: m["chains"][SECOND]["stages"][-1].pop("wires"))
    unet = bundle / "graphs/unet.onnx"
    unet.write_bytes(unet.read_bytes() + b"\x12\x04test")
    record(bundle, "graphs/unet.onnx")
    kernels = first.folder / "text_encoder.NVIDIA-L4.kernels"
    kernels.write_text("left by a load")
    files[kernels.name] = kernels.stat().st_ino
    again = build_here(str(bundle), options={"builder_optimization_level": 0}, **AHEAD)
    assert phases(again) == ["compile unet"] and again.folder == first.folder
    after = inodes(again.folder)
    assert after.keys() == files.keys() and {f for f in files if after[f] != files[f]} == {"unet.engine"}


@pytest.mark.skipif(not openvino.has_bf16(), reason="this CPU has no bf16")
def test_a_chain_for_which_bf16_will_not_do(bundle: Path) -> None:
    """What `auto` settled on for the first chain fails in the second: the next is taken, for both."""
    before = build_here(str(bundle), backend="openvino", quiet=True)
    assert engine_of(before).settled == {"inference_precision": "bf16"}
    add_second_chain(bundle, prediction="state")  # its bound is fp32's in every precision
    after = build_here(str(bundle), backend="openvino", quiet=True)
    assert after.folder == before.folder and engine_of(after).settled["inference_precision"] in ("mixed", "fp32")
    tried = phases(after)
    assert tried[:2] == [f"compile {GRAPH}", f"verify {SECOND}"] and tried[-2:] == [
        f"verify {FIRST}",
        f"verify {SECOND}",
    ]
    assert all(c.passed for checks in after.checks.values() for c in checks) and after.precision["unet"] == "fp32"
    assert phases(build_here(str(bundle), backend="openvino", quiet=True)) == []


def test_engines_are_kept_elsewhere(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some" / "where"
    done = called("build-engine", bundle, "--engines", elsewhere, "--json", *ON_ARGUMENTS)
    result = json.loads(done.stdout)
    assert result["folder"] == str(elsewhere / result["engine"]) and not (bundle / "engines").exists()
    assert [p.name for p in elsewhere.iterdir()] == [result["engine"]]
    assert phases(build_here(str(bundle), engines=elsewhere, quiet=True, **ON)) == []
    with pytest.raises(BundleError, match="it has none"):
        Pipeline.load(bundle)
    with Pipeline.load(bundle, engines=elsewhere) as pipe:
        assert pipe("a cat", seed=0, output_type="uint8").images.any()
    with pytest.raises(BundleError) as refused:
        Pipeline.load(bundle, engines=tmp_path / "none")
    assert str(refused.value).endswith(f"build one: build-engine {bundle} --engines {tmp_path / 'none'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"engines .*file: a folder was expected"):
        build_here(str(bundle), engines=tmp_path / "file", quiet=True, **ON)


def test_the_command_for_a_missing_chain_mends_the_engine_that_was_loaded(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    build_here(str(bundle), engines=elsewhere, quiet=True, **ON)
    add_second_chain(bundle)
    with Pipeline.load(bundle, engines=elsewhere) as pipe, pytest.raises(BundleError) as refused:
        pipe("a cat", chain=SECOND)
    command(*shlex.split(str(refused.value).partition("; add it: ")[2]))
    assert not (bundle / "engines").exists()
    with Pipeline.load(bundle, engines=elsewhere, chain=SECOND) as pipe:
        assert pipe("a cat", seed=0, chain=SECOND, output_type="uint8").images.any()


READ_ONLY = """
mount -t tmpfs -o size=200m none disk && cp -r x.bundle disk/ && mount -o remount,ro disk || exit 9
"$1" disk/x.bundle --backend onnxruntime --device cpu; echo built $?
"$1" disk/x.bundle --backend onnxruntime --device cpu; echo again $?
"$2" generate disk/x.bundle "a cat" -o x.png; echo drawn $?
ls disk/x.bundle
"""


def test_a_bundle_that_is_read_only(bundle: Path, tmp_path: Path) -> None:
    """On a file system that is mounted read-only, which binds root too: its engine is in the user's cache."""
    (tmp_path / "disk").mkdir()
    bundle.rename(tmp_path / "x.bundle")
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    commands = [BUILD, BUILD.with_name("turbochain")]
    done = subprocess.run(
        [*line, *commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert [f"{word} 0" in done.stdout for word in ("built", "again", "drawn")] == [True] * 3, done
    assert "nothing to do: it is built and verified already" in done.stdout
    assert "engines" not in done.stdout.split("drawn 0")[1].split()
    (engine,) = (tmp_path / "cache/turbochain/engines").glob("*/*/engine.json")
    assert engine.parents[1].name == Bundle.open(tmp_path / "x.bundle").id


def test_two_at_once_and_a_kill_between(bundle: Path) -> None:
    """A build that adds a chain is killed, and two go on from there: one of them works, and the old engine is whole."""
    before = build_here(str(bundle), backend="openvino", chains=[FIRST], quiet=True)
    shutil.copytree(before.folder, bundle / "kept")
    (before.folder / "engine.json").write_text("{")
    line = [BUILD, bundle, "--backend", "openvino"]
    killed = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    state = bundle / "engines/.building/state.json"
    while not (state.exists() and "compile text_encoder" in state.read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (before.folder / "engine.json").read_text() == "{"  # as it was
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [builder.communicate(timeout=200) for builder in both]
    assert [builder.returncode for builder in both] == [0, 0], ended
    said = "".join(stderr for _, stderr in ended)
    assert "compile text_encoder" not in said and said.count("compile vae_decoder ") == 2  # it begins, and is done
    assert said.count("waiting: another build of") >= 1
    assert sum("nothing to do: it is built and verified already" in stdout for stdout, _ in ended) == 1
    assert [p.name for p in (bundle / "engines").iterdir()] == [before.engine]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames leaves the old folder aside; a kill after them leaves both."""
    for name in ("old", "new", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    writing.replace_directory(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/file").read_text() == "new" and {p.name for p in tmp_path.iterdir()} == {"old", "whole"}
    (tmp_path / "old").rename(tmp_path / ".old.replaced")
    shutil.copytree(tmp_path / "whole", tmp_path / ".whole.replaced")
    writing.recover_directories(tmp_path)
    assert {p.name: (p / "file").read_text() for p in tmp_path.iterdir()} == {"old": "new", "whole": "whole"}
