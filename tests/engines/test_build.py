"""Building: once, resumable, whole or not at all, and checked before it is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ON, ON_ARGUMENTS, called, command
from safetensors.numpy import load_file as read_tables
from safetensors.numpy import save as save_tables
from second_chain import record

from turbochain.engines import build
from turbochain.export.sources.digests import MEMORY
from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Engine

BUILD = Path(sys.executable).with_name("build-engine")
CHAIN = "text-to-image"
GRAPHS = ("text_encoder", "unet", "step", "step+guidance", "vae_decoder", "vae_encoder", "start")
EXPORT = ["load", "reference", *(f"export {c}" for c in ("text_encoder", "unet", "vae", "sampler"))]
ENGINE = [*(f"compile {g}" for g in GRAPHS), f"verify {CHAIN}", "verify image-to-image"]
TEXT = [f"compile {g}" for g in GRAPHS[:5]] + [f"verify {CHAIN}"]
ALL = EXPORT + ENGINE


def phases(stderr: str, end: str = "done") -> list[str]:
    """The phases that the lines on stderr say were done (or failed)."""
    lines = [line.rsplit(None, 3) for line in stderr.splitlines() if line.endswith(" s")]
    return [name.strip() for name, how, _, _ in lines if how == end]


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time, without what is remembered about a source's files."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "source.json")
    found = {str(p.relative_to(folder)): p.stat() for p in files}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def without_torch(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process, and see that it imported none of the exporter's libraries."""
    check = "\nimport sys\nheavy = {'torch', 'diffusers', 'transformers', 'onnx'}"
    line = [sys.executable, "-c", f"{code}{check}\nassert not heavy & set(sys.modules), heavy & set(sys.modules)"]
    return subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True, timeout=100)


def test_a_second_build_does_nothing(sd: Path, checkpoints: dict[str, Path]) -> None:
    before = sizes(sd)
    for source in (checkpoints["sd"], sd):
        done = called("build-engine", source, "-o", sd, "--size", "64x64", "--steps", "1-4", *ON_ARGUMENTS)
        assert done.returncode == 0 and "nothing to do: it is built and verified already" in done.stdout, done
        assert phases(done.stderr) == []
    assert sizes(sd) == before


def test_a_second_build_imports_no_torch(sd: Path, checkpoints: dict[str, Path]) -> None:
    code = (
        "import sys; from turbochain.engines import build\n"
        "assert build(sys.argv[1], sys.argv[2], size=(64, 64), backend='onnxruntime').phases == []"
    )
    done = without_torch(code, checkpoints["sd"], sd)
    assert done.returncode == 0, done.stderr


def test_a_new_engine_imports_no_torch(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    shutil.rmtree(bundle / "engines")
    code = (
        "import sys; from turbochain.engines import build\n"
        "print([phase.name for phase in build(sys.argv[1], backend='onnxruntime').phases])"
    )
    done = without_torch(code, bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ENGINE}\n" and phases(done.stderr) == ENGINE
    assert [p.name for p in bundle.glob("engines/*")] == [p.name for p in sd.glob("engines/*")]
    assert called("turbochain", "verify", bundle).returncode == 0


@pytest.mark.parametrize("damage", ["{", pytest.param('{"format_version": 2}', marks=pytest.mark.full)])
def test_a_damaged_engine_is_built_again(sd: Path, copy_of, damage: str) -> None:
    bundle = copy_of(sd)
    (engine,) = bundle.glob("engines/*/engine.json")
    engine.write_text(damage)
    done = called("build-engine", bundle, "--chains", CHAIN, *ON_ARGUMENTS)
    assert done.returncode == 0 and phases(done.stderr) == TEXT, done
    assert [p.name for p in bundle.glob("engines/*/*")] == ["engine.json"]
    with Pipeline.load(bundle) as pipe:
        assert pipe("a cat", seed=0, output_type="uint8").images.any()


MUTATIONS = {
    "sample": (lambda tables: tables["1/m"].__imul__(1.01), "schedule: relative_l2 is"),
    "time": (lambda tables: tables["columns/time_projections"].__imul__(1.01), "schedule: relative_l2 is"),
    "input scale": (lambda tables: tables["1/input_scale"].__imul__(1.5), "unet: relative_l2 is"),
}


def edit_tables(bundle: Path, edit: Any) -> None:
    path = bundle / f"tables/{CHAIN}.safetensors"
    tables = read_tables(path)
    edit(tables)
    path.write_bytes(save_tables(tables))
    record(bundle, str(path.relative_to(bundle)))


@pytest.mark.parametrize("case", ["sample", pytest.param("time", marks=pytest.mark.full), "input scale"])
def test_an_engine_that_fails_is_not_installed(sd: Path, copy_of, case: str) -> None:
    bundle, (mutate, expected) = copy_of(sd), MUTATIONS[case]
    shutil.rmtree(bundle / "engines")
    edit_tables(bundle, mutate)
    before = sizes(bundle)
    done = called("build-engine", bundle, *ON_ARGUMENTS)
    assert (done.returncode, done.stdout) == (1, ""), done
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"build-engine: error: chain {CHAIN}: the result differs from what diffusers produced: ")
    assert expected in last and "the bound is ≤ " in last and "Traceback" not in done.stderr
    assert sizes(bundle) == before and not list(bundle.glob("engines/*"))


def test_the_summary_and_the_phases(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    shutil.rmtree(bundle / "engines")
    done = command("build-engine", bundle, *ON_ARGUMENTS)
    _, first, second = re.split(r"^chain (?=text-to-image$|image-to-image$)", done.stdout, flags=re.M)
    (name, head, rule, *rows), (other, same, _, *others) = first.splitlines(), second.splitlines()
    assert (name, other) == (CHAIN, "image-to-image") and head.split() == same.split()
    assert head.split("  ")[0] == "stage" and set(rule) == {"-", " "}
    columns = [c.strip() for c in head.split("  ") if c.strip()]
    assert columns == ["stage", "precision", "engine size", "build time", "error", "bound", "remedy"]
    judged = ["ids", "schedule", "text_encoder", "unet", "step", "vae_decoder", "vae_decoder", "image", "image"]
    assert [row.split()[0] for row in rows] == [*judged, "step+guidance"]
    images = {row.split()[0] for row in others if "≤" in row}
    assert images == {*judged, "step+guidance", "vae_encoder", "start"}
    assert all(text in rows[2] for text in ("fp32", "MiB", " s ", "max_abs", "≤ 0.001"))
    assert f"{bundle}: built and verified in " in done.stdout and "backend onnxruntime (" in done.stdout
    engine = strict_json.read(Engine, next(bundle.glob("engines/*/engine.json")))
    assert set(engine.graphs) == set(GRAPHS) and all(graph.build_seconds > 0 for graph in engine.graphs.values())
    assert {*engine.checks} == {CHAIN, "image-to-image"} and all(engine.checks.values())
    assert all(check.passed for checks in engine.checks.values() for check in checks)


def test_the_result_as_json(sd: Path) -> None:
    done = called("build-engine", sd, "--json", *ON_ARGUMENTS)
    result = json.loads(done.stdout)
    assert result["bundle"] == str(sd) and result["phases"] == [] and result["backend"] == "onnxruntime"
    assert result["precision"] == dict.fromkeys(GRAPHS, "fp32") and result["checks"][CHAIN]
    assert all(c["passed"] for c in result["checks"][CHAIN]) and result["folder"] == f"{sd}/engines/{result['engine']}"


def test_peaks_are_those_of_the_phase(sd: Path, copy_of, capfd: pytest.CaptureFixture[str]) -> None:
    """Not of the process that started it: this one has torch in it. A quiet build says nothing."""
    bundle, ballast = copy_of(sd), b"turbochain" * 60_000_000
    shutil.rmtree(bundle / "engines")
    peaks = [phase.peak_bytes for phase in build(str(bundle), chains=[CHAIN], quiet=True, **ON).phases]
    assert len(ballast) == 600e6 and all(20e6 < peak < 500e6 for peak in peaks), peaks
    assert capfd.readouterr() == ("", "")


def test_the_default_name(tmp_path: Path, sd: Path, copy_of) -> None:
    """The source's own name, here; told from which lock is taken, so nothing is built."""
    (tmp_path / "hub").mkdir()
    for source, name in {
        "stabilityai/sd-turbo": "sd-turbo",
        "synthetic:sd-turbo": "sd-turbo",
        "demo": "demo",
        "some/where/x/": "x",
        "x.y": "x.y",
    }.items():
        (tmp_path / f"{name}.bundle").mkdir(exist_ok=True)
        done = called("build-engine", source, cwd=tmp_path)
        assert f"error: {name}.bundle exists and is not a bundle" in done.stderr
    bundle = copy_of(sd)
    done = called("build-engine", bundle, *ON_ARGUMENTS, cwd=tmp_path / "hub")
    assert done.stdout.count(f"{bundle}: nothing to do") == 1


def test_a_bundle_is_copied_without_torch(sd: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from turbochain.engines import build\n"
        "build(sys.argv[1], sys.argv[2], backend='onnxruntime', chains=['text-to-image'])"
    )
    done = without_torch(code, sd, tmp_path / "copy.bundle")
    assert done.returncode == 0 and phases(done.stderr) == TEXT, done.stderr
    pictures = []
    for path in (sd, tmp_path / "copy.bundle"):
        with Pipeline.load(path) as pipe:
            pictures.append(pipe("a cat", seed=0, output_type="uint8").images)
    assert (pictures[0] == pictures[1]).all() and not list(tmp_path.glob("*.partial"))


def test_a_damaged_bundle_is_not_copied(sd: Path, copy_of, tmp_path: Path) -> None:
    bundle = copy_of(sd)
    (bundle / "graphs/unet.fp32-0.data").unlink()
    done = called("build-engine", bundle, "-o", tmp_path / "copy.bundle", *ON_ARGUMENTS)
    assert (
        done.returncode == 2
        and "'graphs/unet.fp32-0.data' is missing" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == [bundle.name]


def test_a_bundle_does_not_tell_where_it_was_built(sd: Path, checkpoints: dict[str, Path]) -> None:
    text = (sd / "bundle.json").read_text()
    assert checkpoints["sd"].name in text and str(checkpoints["sd"].parent) not in text


def test_a_changed_source_is_noticed(sd: Path, checkpoints: dict[str, Path], copy_of, tmp_path: Path) -> None:
    """`cd checkpoint; build-engine .`: the bundle lies in its source."""
    source = tmp_path / "a-copy"
    shutil.copytree(checkpoints["sd"], source, copy_function=shutil.copyfile)
    bundle = copy_of(sd).rename(source / "a-copy.bundle")

    def again() -> subprocess.CompletedProcess[str]:
        return called("build-engine", ".", "--size", "64x64", *ON_ARGUMENTS, cwd=source)

    def state() -> dict[str, tuple[int, int]]:
        return {name: found for name, found in sizes(bundle).items() if name != MEMORY}

    before = state()
    for stray in (".DS_Store", "README.md", "unet/x.safetensors"):
        (source / stray).write_text("x")
        done = again()
        assert done.returncode == 0 and "a-copy.bundle: nothing to do: it is built and verified already" in done.stdout
    (source / "unet/config.json").open("a").write("\n")
    weights = source / "vae/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = again()
    changed = "unet/config.json, vae/diffusion_pytorch_model.safetensors"
    expected = f"a-copy.bundle holds another build (files of the source have changed: {changed}): choose another path"
    assert done.returncode == 2 and expected in done.stderr and state() == before


def test_a_full_disk_and_two_at_once(interrupted: Path) -> None:
    """One build, of a folder that has only fp16 weights, that meets both, and does nothing twice."""
    whole = [phase for phase in ALL if phase not in ("compile vae_encoder", "compile start", "verify image-to-image")]
    full, first, second = ((interrupted / name).read_text() for name in ("full", "first", "second"))
    assert phases(full) == ALL[:2] and phases(full, "failed") == ALL[2:3]
    said = full.splitlines()[-1]
    assert said.startswith("build-engine: error: ") and "no space left" in said and "Traceback" not in full
    assert sorted([phases(first), phases(second)]) == [[], whole[2:]], (first, second)
    assert (first + second).count("waiting: another build of disk/x.bundle.partial is running") == 1
    known = (" s", " …"), ("backend ", "waiting: ")
    assert all(line.endswith(known[0]) or line.startswith(known[1]) for line in (first + second).splitlines()), first
    told = sorted((interrupted / f"{name}.out").read_text() for name in ("first", "second"))
    assert all("disk/x.bundle: " in text for text in told)
    assert sum("nothing to do: it is built and verified already" in text for text in told) == 1
    parts = Bundle.open(interrupted / "x.bundle").manifest.checkpoint.parts
    weighty = ("text_encoder", "unet", "vae")
    assert {name: part.variant for name, part in parts.items() if part.weights} == dict.fromkeys(weighty, "fp16")
    assert called("turbochain", "verify", interrupted / "x.bundle").returncode == 0


@pytest.mark.full
def test_an_export_that_was_killed_goes_on(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """An engine's build that was killed does, too: `test_chains.py`."""
    line = ("build-engine", checkpoints["sd"], "-o", tmp_path / "x.bundle", *ON_ARGUMENTS, "--size", "64x64")
    killed = subprocess.Popen([BUILD, *map(str, line[1:])], stderr=subprocess.PIPE, text=True)
    state = tmp_path / "x.bundle.partial/state.json"
    while not (state.exists() and "export text_encoder" in state.read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    done = command(*line)
    assert done.returncode == 0 and phases(done.stderr) == ALL[3:], done
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]


CHATTER = """
import sys, warnings
print("printed"); warnings.warn("warned"); sys.stderr.write("written\\n")
"""


def test_chatter_is_hidden_unless_verbose(sd: Path, copy_of, tmp_path: Path) -> None:
    """A library that talks: one that Python imports into every process that has this folder on its path."""
    bundle = copy_of(sd)
    (tmp_path / "onnxruntime.py").write_text(CHATTER + "raise RuntimeError('no')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for options, seen in (((), False), (("-v",), True)):
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        done = command("build-engine", bundle, *options, *ON_ARGUMENTS, env=env)
        assert done.returncode == 1 and "build-engine: error: the phase compile failed: RuntimeError: no" in done.stderr
        assert [word in done.stderr for word in ("printed", "warned", "written")] == [seen] * 3, done.stderr
        assert done.stdout == ""
