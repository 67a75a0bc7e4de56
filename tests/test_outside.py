"""No command opens an internet socket or looks up a name, and none leaves a file that was not asked for."""

import re
import signal
import sys
from pathlib import Path

import outside
import pytest
from asking import Client, until
from conftest import program

LOOKS_UP = "import socket; socket.getaddrinfo('turbochain.invalid', 80)"
CONNECTS = "import socket; socket.create_connection(('127.0.0.1', 1))"
LISTENS = "import socket; socket.create_server(('127.0.0.1', 0)).close()"
DAEMON = f"import os; os.fork() and os._exit(0); os.setsid(); {LOOKS_UP}"
RUNTIME = """
import sys
from turbochain.runtime.commands.main import main
bundle, lora, *machine = sys.argv[1:]
for line in (["inspect", bundle], ["adapter", "convert", lora, bundle, "-o", "lora.safetensors"]):
    assert main(line) == 0, line
for line in (["generate", bundle, "a cat", "-o", "cat.png"], ["verify", bundle], ["bench", bundle, "--runs=1"]):
    assert main([*line, *machine]) == 0, line
assert main(["bench", bundle, "--runs=1", "--profile", *machine]) == 0
"""
MCP = """
import asyncio, os, sys
from mcp import Client, StdioServerParameters
async def call():
    server = StdioServerParameters(command=sys.argv[1], args=["mcp", *sys.argv[2:]], env=dict(os.environ))
    async with Client(server) as client:
        answer = await client.call_tool("generate_image", {"prompt": "a cat"})
        assert [part.type for part in answer.content] == ["image", "text"], answer
asyncio.run(call())
"""


@pytest.mark.parametrize("script", [LOOKS_UP, DAEMON], ids=["look-up", "daemon"])
def test_the_guard_notices(script: str, tmp_path: Path) -> None:
    assert outside.run(sys.executable, "-c", script, home=tmp_path).returncode == outside.REACHED


def test_the_guard_lets_a_command_work(tmp_path: Path) -> None:
    done = outside.run(sys.executable, "-c", "print(open('/proc/self/comm').read())", home=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert outside.run(sys.executable, "-c", "raise SystemExit(3)", home=tmp_path).returncode == 3


@pytest.mark.parametrize(("script", "status"), [(LOOKS_UP, outside.REACHED), (CONNECTS, outside.REACHED), (LISTENS, 0)])
def test_a_server_may_listen_and_no_more(script: str, status: int, tmp_path: Path) -> None:
    done = outside.run(outside.LISTENING, sys.executable, "-c", script, home=tmp_path)
    assert done.returncode == status, done.stderr


def test_the_build_of_a_local_checkpoint(interrupted: Path, checkpoints: dict[str, Path], shared: Path) -> None:
    """With no network it has ended well, see `interrupted`, although the build before it met a full disk."""
    assert outside.left(shared / "interrupted-home") == set()
    told = {"full", "first", "first.out", "second", "second.out"}
    names = {path.name for path in checkpoints["sd"].iterdir()}
    assert {path.name for path in interrupted.iterdir()} == names | told | {"disk", "x.bundle"}
    assert not any((interrupted / "disk").iterdir())


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.full)])
def test_a_build_of_an_engine_and_every_command(backend: str, sd: Path, reference_lora: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    machine = (f"--backend={backend}", "--engines=engines")
    built = outside.run(program("build-engine"), sd, *machine, "--chains=text-to-image", home=home, cwd=work)
    assert built.returncode == 0, built.stderr
    done = outside.run(sys.executable, "-c", RUNTIME, sd, reference_lora, *machine, home=home, cwd=work)
    assert done.returncode == 0, done.stderr
    assert outside.left(home) == set()
    assert {path.name for path in work.iterdir()} == {"cat.png", "engines", "lora.safetensors"}


def test_the_server(small: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    line = (program("turbochain"), "serve", small, "--port", 0, "--backend", "onnxruntime")
    with outside.serving(*line, home=home, cwd=work) as process:
        assert process.stderr
        said = process.stderr.readline()
        found = re.fullmatch(r"serving small at (http://\S+)\n", said)
        assert found, said + process.stderr.read()
        client = Client(found[1])
        until(lambda: client.get("/readyz").status == 200)
        assert len(client.draw("a cat").pictures) == 1 and client.get("/").status == 200
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert outside.left(home) == set() and not [*work.iterdir()]


@pytest.mark.full  # two processes that import the protocol's library
def test_the_server_of_a_language_model(sd: Path, tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    line = (sys.executable, "-c", MCP, program("turbochain"), sd, "--backend", "onnxruntime")
    done = outside.run(*line, home=home, cwd=work)
    assert done.returncode == 0, done.stderr
    assert outside.left(home) == set() and not [*work.iterdir()]


def test_a_build_for_another_machine(sd: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    machine = ("--backend=tensorrt", "--target=sm89", "--engines=engines", "--chains=text-to-image")
    machine += ("-O", "builder_optimization_level=0")
    built = outside.run(program("build-engine"), sd, *machine, home=tmp_path / "home", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert outside.left(tmp_path / "home") == set()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "engines"}
