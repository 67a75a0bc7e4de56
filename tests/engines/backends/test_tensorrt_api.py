"""Our calls into TensorRT, held against the real API of each version by a type checker. Nothing of TensorRT is run."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PACKAGES = ("engines", "export", "runtime")
CALLS = "tensorrt_calls.py"
BINDINGS = {
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
    "rtx": "tensorrt-rtx-cu13-bindings==1.7.1.116",
}
NOT_A_NAME = "name_that_no_version_has"

WITHOUT_NUMPY = """
[[tool.mypy.overrides]]  # reading its types takes longer than all else, and no call into TensorRT has them
module = ["numpy.*"]
follow_imports = "skip"
ignore_missing_imports = true
"""

Refusals = dict[str, list[tuple[int, str]]]  # file → (line, what is wrong with it)


def run(*line: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in line], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def users() -> list[str]:
    """Our source files that use TensorRT, which all of them call `trt`."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [str(file.relative_to(ROOT)) for file in files if any(name(node) == "trt" for node in nodes(file))]


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def members(stub: Path) -> set[str]:
    """Names of attributes and methods that tell an object of TensorRT from others."""
    return {word for word in re.findall(r"^    (?:def )?([a-z]\w+)\b", stub.read_text(), re.M) if "_" in word}


@pytest.fixture(scope="module")
def stubs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version → the stub file of its API, made from its wheel, which is fetched once."""
    made = {}
    for version, pin in BINDINGS.items():
        distribution, _, number = pin.partition("==")
        cache = pytestconfig.cache.mkdir(distribution)
        wheels = f"{distribution.replace('-', '_')}-{number}-*.whl"
        if not list(cache.glob(wheels)):
            done = run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", cache, pin)
            assert done.returncode == 0, f"The API of {pin} cannot be had: {done.stderr}"
        folder = tmp_path_factory.mktemp(distribution)
        done = run(sys.executable, HERE / "tensorrt_stubs.py", next(cache.glob(wheels)), folder)
        assert done.returncode == 0, f"No stubs could be made of {pin}: {done.stderr}"
        made[version] = folder / "tensorrt/__init__.pyi"
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our packages as mypy finds them, with `CALLS` among them.

    No `type: ignore` hides a call, and every user of TensorRT ends in a wrong call: where that is not refused,
    neither would any other be.
    """
    folder = tmp_path_factory.mktemp("tree") / "turbochain"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    shutil.copy(HERE / CALLS, folder)
    (folder.parent / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + WITHOUT_NUMPY)
    for file in [*users(), CALLS]:
        text = re.sub(r"# type: ignore\S*", "", (folder / file).read_text())
        (folder / file).write_text(f"{text}\ntrt.{NOT_A_NAME}\n")
    return folder


FULL = {"rtx": pytest.mark.full}  # `test_tensorrt.py` builds with that one


@pytest.fixture(scope="module", params=[pytest.param(version, marks=FULL.get(version, ())) for version in BINDINGS])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def refusals(version: str, stubs: dict[str, Path], tree: Path) -> Refusals:
    """What is wrong with the users of TensorRT and with `CALLS` against this version's API."""
    files = [*users(), CALLS]
    options = ["--config-file", tree.parent / "pyproject.toml", "--cache-dir", tree.parent / "cache"]
    options += ["--explicit-package-bases", "--hide-error-codes"]
    strict = ["--disallow-untyped-defs", "--disallow-any-expr", "--show-column-numbers"]
    paths = [tree / file for file in files]
    environment = {**os.environ, "MYPYPATH": f"{stubs[version].parents[1]}:{tree.parent}"}
    done = run(sys.executable, "-m", "mypy", *options, *strict, *paths, cwd=tree.parent, env=environment)
    assert done.returncode == 1, f"mypy could not check: {done.stdout}{done.stderr}"
    # Of the type Any everything may be asked, so nothing of TensorRT may be of that type.
    known = members(stubs[version])
    asked = {
        (file, node.lineno, node.col_offset + 1): node.attr
        for file in files
        for node in nodes(tree / file)
        if isinstance(node, ast.Attribute) and node.attr in known
    }
    found: Refusals = {file: [] for file in files}
    for file, line, column, problem in re.findall(r"^(.+?):(\d+):(\d+): error: (.*)$", done.stdout, re.M):
        place = (os.path.relpath(tree.parent / file, tree), int(line), int(column))
        if re.match(r'Expression (has type|type contains) "', problem):
            unknown = place in asked and problem == 'Expression has type "Any"'
            problem = f"{asked[place]} is asked of an unknown type" if unknown else ""
        if place[0] in found and problem:
            found[place[0]].append((place[1], problem))
    return found


def test_the_builder_and_the_runtime_are_checked() -> None:
    assert {"engines/backends/tensorrt.py", "runtime/backends/tensorrt.py"} <= set(users())


def test_our_calls_are_right(refusals: Refusals) -> None:
    problems = [(file, line, problem) for file in users() for line, problem in refusals[file]]
    wrong = [f"{file}:{line}: {problem}" for file, line, problem in problems if NOT_A_NAME not in problem]
    assert not wrong, "\n".join(wrong)
    checked = {file for file, _, problem in problems if NOT_A_NAME in problem}
    assert set(users()) <= checked, "`trt` is of no known type here, so that no call is checked"


def test_wrong_calls_are_refused(refusals: Refusals, version: str) -> None:
    lines = (HERE / CALLS).read_text().splitlines()
    marks = {number: re.search(r"# wrong in ([^:]+)", line) for number, line in enumerate(lines, 1)}
    wrong = {number for number, mark in marks.items() if mark and version in mark[1].split()}
    refused = [(line, problem) for line, problem in refusals[CALLS] if NOT_A_NAME not in problem]
    assert [(line, problem) for line, problem in refused if line not in wrong] == []
    assert [(line, lines[line - 1]) for line in sorted(wrong - {line for line, _ in refused})] == []


def test_what_we_detect_exists_somewhere(stubs: dict[str, Path]) -> None:
    words = {word for stub in stubs.values() for word in re.findall(r"\w+", stub.read_text())}
    for file in users():
        for node in nodes(ROOT / file):
            if isinstance(node, ast.Call) and name(node.func) in ("hasattr", "getattr"):
                detected = node.args[1]
                if isinstance(detected, ast.Constant):
                    assert detected.value in words, f"{file}:{node.lineno}: no version has {detected.value}"
