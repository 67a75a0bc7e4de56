"""Nothing is said to the outside, and nothing is left there: no socket, no look-up, no file but what was asked for."""

import sys
from pathlib import Path

import outside
import pytest
from conftest import program

LOOKS_UP = "import socket; socket.getaddrinfo('turbochain.invalid', 80)"
DAEMON = f"import os; os.fork() and os._exit(0); os.setsid(); {LOOKS_UP}"
RUNTIME = """
import sys
from turbochain.runtime.commands.main import main
bundle, *machine = sys.argv[1:]
for line in (["generate", bundle, "a cat", "-o", "cat.png"], ["verify", bundle], ["bench", bundle, "--runs=1"]):
    assert main([*line, *machine]) == 0, line
assert main(["bench", bundle, "--runs=1", "--profile", *machine]) == 0
"""


@pytest.mark.parametrize("script", [LOOKS_UP, DAEMON], ids=["look-up", "daemon"])
def test_the_guard_notices(script: str, tmp_path: Path) -> None:
    assert outside.run(sys.executable, "-c", script, home=tmp_path).returncode == outside.REACHED


def test_the_guard_lets_a_command_work(tmp_path: Path) -> None:
    done = outside.run(sys.executable, "-c", "print(open('/proc/self/comm').read())", home=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert outside.run(sys.executable, "-c", "raise SystemExit(3)", home=tmp_path).returncode == 3


def test_the_build_of_a_local_checkpoint(interrupted: Path, checkpoints: dict[str, Path], shared: Path) -> None:
    """With no network it has ended well, see `interrupted`, although builds before it were stopped."""
    assert outside.left(shared / "interrupted-home") == set()
    told = {"full", "killed", "first", "first.out", "second", "second.out"}
    names = {path.name for path in checkpoints["sdxl"].iterdir()}
    assert {path.name for path in interrupted.iterdir()} == names | told | {"disk", "x.bundle"}
    assert not any((interrupted / "disk").iterdir())


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.full)])
def test_a_build_of_an_engine_and_every_command(backend: str, sd: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    machine = (f"--backend={backend}", "--engines=engines")
    built = outside.run(program("build-engine"), sd, *machine, "--chains=text-to-image", home=home, cwd=work)
    assert built.returncode == 0, built.stderr
    done = outside.run(sys.executable, "-c", RUNTIME, sd, *machine, home=home, cwd=work)
    assert done.returncode == 0, done.stderr
    assert outside.left(home) == set()
    assert {path.name for path in work.iterdir()} == {"cat.png", "engines"}


def test_a_build_for_another_machine(sd: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    machine = ("--backend=tensorrt", "--target=sm89", "--engines=engines", "--chains=text-to-image")
    machine += ("-O", "builder_optimization_level=0")
    built = outside.run(program("build-engine"), sd, *machine, home=tmp_path / "home", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert outside.left(tmp_path / "home") == set()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "engines"}
