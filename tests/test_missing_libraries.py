"""A library that is not installed is named, with the command that installs it, in an environment that lacks it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from diffusers import (  # noqa: F401 - what a library says when they are imported is none of a build's sentences
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from refusals import refused

import turbochain.runtime


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def environment(folder: Path, *distributions: str) -> Path:
    """A real environment that has only these distributions (linked to ours) and turbochain; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "turbochain").mkdir()
    for part in ("runtime", "export", "engines"):
        (site / "turbochain" / part).symlink_to(Path(turbochain.runtime.__file__).parents[1] / part)
    return folder / "bin" / "python"


BASE = ("numpy", "tokenizers", "safetensors", "pillow")


CALLS = """
import contextlib, io, json, sys
from turbochain.engines import cli
from turbochain.runtime.commands import main

entries, answers = {"turbochain": main.main, "build-engine": cli.main}, []
for program, *words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = entries[program](words)
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def called_by(python: Path, folder: Path, *lines: tuple[str, ...]) -> list[subprocess.CompletedProcess[str]]:
    """Call these commands, one after the other, in one process of that python."""
    line = [python, "-c", CALLS, json.dumps(lines)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return [subprocess.CompletedProcess(line, *answer) for line, answer in zip(lines, answers, strict=True)]


def test_a_backend_that_is_not_installed(sd: Path, checkpoints: dict[str, Path], copy_of, tmp_path: Path) -> None:
    python, bundle = environment(tmp_path / "env", *BASE), copy_of(sd)
    before = listing(bundle)
    *refusals, shown = called_by(
        python,
        tmp_path,
        ("turbochain", "generate", str(bundle), "a cat"),
        ("turbochain", "generate", str(bundle), "a cat", "--backend", "onnxruntime"),
        ("turbochain", "verify", str(bundle)),
        ("turbochain", "bench", str(bundle)),
        ("build-engine", str(bundle)),
        ("build-engine", str(checkpoints["sd"]), "--backend", "onnxruntime"),
        ("turbochain", "inspect", str(bundle)),
    )
    for done in refusals:
        said = refused(done)
        assert "installed: pip install 'turbochain[cpu]'" in said, said
    assert shown.returncode == 0 and "does not fit: its backend onnxruntime is not installed" in shown.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env", bundle.name] and listing(bundle) == before


def test_the_exporter_is_not_installed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "env", *BASE, "onnxruntime")
    line = [python, "-m", "turbochain.engines.cli", checkpoints["sd"]]
    said = refused(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60))
    assert "torch" in said and said.endswith("pip install 'turbochain[export]'")
    assert [p.name for p in tmp_path.iterdir()] == ["env"]
