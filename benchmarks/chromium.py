"""Drive a headless Chromium by its DevTools protocol: what the page's tests and `serve_page.py` need, and no more."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--mute-audio", "--force-color-profile=srgb",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--remote-debugging-port=0",
)  # fmt: skip
SECONDS = 20.0
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


def executable() -> str | None:
    """Return the path of an installed Chromium; None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Page:
    """A tab. Events from it and from its workers that came meanwhile are in `events`, as (method, parameters)."""

    socket: ClientConnection
    session: str | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _count: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result. Raises RuntimeError for what Chromium refuses."""
        (result,) = self.calls(method, parameters)
        return result

    def calls(self, method: str, *each: dict[str, Any]) -> list[dict[str, Any]]:
        """Call a method with each of these parameters, without waiting in between, and return the results."""
        numbers = [self._send(self.session, method, parameters) for parameters in each]
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(each):
            answer = self._receive()
            if answer.get("id") in numbers:
                answers[answer["id"]] = answer
        refused = next((answer["error"]["message"] for answer in answers.values() if "error" in answer), None)
        if refused is not None:
            raise RuntimeError(f"{method}: {refused}")
        return [answers[number]["result"] for number in numbers]

    def watch(self, session: str | None) -> None:
        """Let a session tell its events, and those of the workers that it starts, which wait until this is done."""
        attach = {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}
        for domain in ("Runtime", "Log", "Network"):
            self._send(session, f"{domain}.enable", {})
        self._send(session, "Target.setAutoAttach", attach)
        self._send(session, "Runtime.runIfWaitingForDebugger", {})

    def _send(self, session: str | None, method: str, parameters: dict[str, Any]) -> int:
        """Send a call, and return its number."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        return self._count

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv(60))
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        if message.get("method") == "Target.attachedToTarget" and message.get("sessionId"):
            self.watch(message["params"]["sessionId"])
        return message

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Return what an expression evaluates to, as JSON; a promise is awaited. Raises RuntimeError if it throws."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS) -> Any:
        """Return an expression's value when it is true. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (found := self.run(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} was not true after {seconds:g} s")
            time.sleep(0.01)
        return found

    def key(self, character: str) -> None:
        """Press and release a key that types a character, in what has the focus."""
        self.call("Input.dispatchKeyEvent", type="keyDown", text=character, key=character)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def press(self, name: str) -> None:
        """Press and release a key of KEYS."""
        code, more = KEYS[name], {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=code)

    def type(self, selector: str, text: str) -> None:
        """Put the focus on an element, and type."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        for character in text:
            self.key(character)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def view(self, width: int, height: int, *, scheme: str = "light", touch: bool = False) -> None:
        """Set the size of the window in pixels, and light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(downloads: Path | None = None, *flags: str) -> Iterator[Page]:
    """Start Chromium with these flags beside its own, give an empty tab, and end it.

    Files that pages save go to `downloads`.
    """
    path = executable()
    if path is None:
        raise FileNotFoundError("no Chromium is installed: Debian's package is chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        line = [path, *OPTIONS, *flags, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile), process), max_size=None, compression=None) as socket:
                yield _tab(socket, downloads)
        finally:
            process.terminate()
            process.wait(20)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the address of the DevTools, which Chromium writes when it listens."""
    file, end = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (file.exists() and len(lines := file.read_text().split()) == 2):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("Chromium did not start")
        time.sleep(0.02)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


def _tab(socket: ClientConnection, downloads: Path | None) -> Page:
    page = Page(socket)
    target = page.call("Target.createTarget", url="about:blank")["targetId"]
    page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "DOM"):
        page.call(f"{domain}.enable")
    page.watch(page.session)
    if downloads is not None:
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    return page
