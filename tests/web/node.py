"""One Node process with turbochain.mjs, which answers a test's questions."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import turbochain.runtime

ROOT = Path(__file__).parents[2]
WEB = Path(turbochain.runtime.__file__).parent / "web"
PACKAGES = ROOT / ".node/node_modules"
LEAST = (20, 16)  # the first Node with process.getBuiltinModule


def lacks() -> str:
    """Return what is missing for Node's tests; "" if nothing is."""
    program = shutil.which("node")
    if program is None:
        return "node is not installed"
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip().removeprefix("v")
    if tuple(map(int, version.split(".")[:2])) < LEAST:
        return f"node is {version}, and {'.'.join(map(str, LEAST))} is needed"
    package = json.loads((WEB / "package.json").read_text())
    wanted = package["dependencies"] | package["devDependencies"]
    missing = [name for name in wanted if not (PACKAGES / name / "package.json").is_file()]
    return f"{PACKAGES} lacks {', '.join(missing)}: make setup installs them if npm is there" if missing else ""


class Refused(Exception):
    """What turbochain.mjs threw: the name of the error, and its message."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message


class Node:
    """A process that answers by answers.mjs."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the answer. Raises Refused if the module threw something."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"ask": what, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"node has ended: {self._log.read_text()}"
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"], answer["message"])
        return answer["value"]

    def picture(self, pipe: str, prompt: str, image: np.ndarray | None = None, **more: Any) -> np.ndarray:
        """Return the levels of a call's picture, [H, W, 3]."""
        answer = self.ask("draw", pipe=pipe, prompt=prompt, image=None if image is None else pixels(image), **more)
        levels = values(answer["data"], np.uint8).reshape(answer["height"], answer["width"], 4)
        assert (levels[..., 3] == 255).all()
        return levels[..., :3]


def values(text: str, dtype: Any) -> np.ndarray:
    """Return what base64 stands for."""
    return np.frombuffer(base64.b64decode(text), dtype)


def pixels(image: np.ndarray) -> dict[str, Any]:
    """Return an image [H, W, C] for a call."""
    return {"data": base64.b64encode(image.tobytes()).decode(), "width": image.shape[1], "height": image.shape[0]}


@contextmanager
def running(folder: Path) -> Iterator[Node]:
    """Start a process in an empty folder, where the packages lie beside the module as in a project of npm's."""
    for file in (WEB / "turbochain.mjs", Path(__file__).with_name("answers.mjs")):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(PACKAGES)
    log = folder / "log"
    line = ["node", folder / "answers.mjs"]
    with (
        log.open("w") as err,
        subprocess.Popen(line, stdin=-1, stdout=-1, stderr=err, text=True, cwd=folder) as process,
    ):
        yield Node(process, log)
        assert process.stdin
        process.stdin.close()
