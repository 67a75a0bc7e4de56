"""Measure how long the page takes from a key to the picture, without the drawing, in a headless Chromium.

`python benchmarks/serve_page.py BUNDLE` serves a source that answers at once in place of the bundle's pictures.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image, ImageFilter

import machine
import result
from chromium import Page, chromium
from rows import BenchmarkRun
from turbochain.export.phases.phases import versions
from turbochain.runtime.serve import listen
from turbochain.runtime.serve.app import make_app
from turbochain.runtime.serve.encoding import Encoding
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

SIZE = 512
BAR_MS = 20.0
WARM_UP = 5
PAUSES = (0.08, 0.25)  # seconds between a picture and the next key: as typed, and at any time of a frame
PACKAGES = ("turbochain", "fastapi", "starlette", "uvicorn", "websockets", "pillow", "numpy")
INCLUDES = {
    "milliseconds": "from a key's event (its timeStamp) to the first task after the frame that shows its picture was "
    "rendered, less what the server says that drawing took: the page, the socket, encoding as JPEG 90, decoding and "
    "the wait for the next of 60 frames a second, of which a half is 8.3 ms",
    "picture": "512x512, smoothed noise, always the same; its JPEG has `picture_bytes`",
    "keys": "one at a time, at random moments, in the page's prompt box; the first five are not counted",
}

MEASURE = """
(() => {
  const Own = WebSocket;
  let drawn = 0, started = 0, resolve = null;
  window.WebSocket = class extends Own {
    constructor(...parts) {
      super(...parts);
      this.addEventListener("message", ({ data }) => { drawn = new DataView(data).getFloat32(8, true); });
    }
  };
  addEventListener("keydown", (event) => {
    started = event.timeStamp;
    window.painted = new Promise((found) => { resolve = found; });
  }, true);
  const show = ImageBitmapRenderingContext.prototype.transferFromImageBitmap;
  ImageBitmapRenderingContext.prototype.transferFromImageBitmap = function (bitmap) {
    show.call(this, bitmap);
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => resolve(performance.now() - started - drawn);
      port2.postMessage(null);
    });
  };
})();
"""


class Instant:
    """A source that answers at once with the same picture."""

    state = State(ready=True)

    def __init__(self) -> None:
        """Make the picture, about as hard to encode as a photo."""
        noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        self.picture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)))

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        """Return the picture."""
        return Drawn(self.picture, 0.0)

    async def start(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class PageResult:
    """The results file."""

    run: BenchmarkRun
    browser: str
    load_average: float  # processes that wanted a core in the minute before; with more than the cores it is disturbed
    picture_bytes: int
    milliseconds: list[float]  # of each key
    p50_ms: float
    p99_ms: float
    bar_ms: float  # for the p50
    includes: dict[str, str]


@contextlib.contextmanager
def served(bundle: str, source: Instant) -> Iterator[str]:
    """Serve a source under a bundle's name in a thread, and give the address."""
    settings = Settings((bundle,), port=0)
    models, metrics = Models.open(settings), Metrics()
    with listen.listening(settings) as listening:
        server = uvicorn.Server(listen.config(make_app(Service(models, source, settings, metrics))))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def measure(page: Page, url: str, keys: int) -> list[float]:
    """Return the milliseconds of each key."""
    page.call("Network.disable")  # it would copy every message to this process
    page.call("Page.addScriptToEvaluateOnNewDocument", source=MEASURE)
    page.open(url)
    page.wait("document.querySelector('#connection').dataset.state === 'open'")
    page.run("document.querySelector('#prompt').focus()")
    chance, found = random.Random(0), []
    for i in range(WARM_UP + keys):
        time.sleep(chance.uniform(*PAUSES))
        page.key("abcdefghij "[i % 11])
        found.append(page.run("window.painted"))
    return found[WARM_UP:]


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the results file and say the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="a bundle of 512x512; nothing of it is drawn")
    parser.add_argument("--keys", type=int, default=30)
    parser.add_argument("--results", type=Path, default=result.FOLDER)
    given = parser.parse_args(arguments)
    run, source, load = machine.run(), Instant(), os.getloadavg()[0]
    with served(given.bundle, source) as url, chromium() as page:
        browser = page.call("Browser.getVersion")["product"]
        took = measure(page, url, given.keys)
    made = PageResult(
        run=replace(run, versions=versions(*PACKAGES)),
        browser=browser,
        load_average=round(load, 2),
        picture_bytes=len(Encoding("jpeg").encode(source.picture)),
        milliseconds=[round(ms, 2) for ms in took],
        p50_ms=round(statistics.median(took), 2),
        p99_ms=round(float(np.percentile(took, 99)), 2),
        bar_ms=BAR_MS,
        includes=INCLUDES,
    )
    path = given.results / machine.file_name("serve-page", SIZE, SIZE)
    result.write_json(asdict(made), path)
    verdict = "met" if made.p50_ms <= BAR_MS else "missed"
    print(f"p50 {made.p50_ms} ms, p99 {made.p99_ms} ms: the bar of {BAR_MS:g} ms is {verdict}; {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
