"""The page of `turbochain export-web` in a headless Chromium, which draws by itself: `make check-web`."""

import base64
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ON
from here import build_here
from PIL import Image
from serving import serving
from static import Static, static
from test_web import KEPT, opened, problems

from chromium import Page, chromium, executable
from turbochain.runtime import Pipeline
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.commands import main

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed: Debian's package is chromium"),
]

PROMPT = "a large red circle left of a small blue square on a yellow background"
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
LONG = 120.0  # seconds: these pictures are drawn by a processor that has other things to do
OPEN = "document.querySelector('#connection').dataset.state === 'open'"
LOST = "document.querySelector('#connection').dataset.state === 'lost'"


def text(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def export(bundle: Path, site: Path) -> Path:
    """Write a site."""
    assert main(["export-web", str(bundle), "-o", str(site)]) == 0
    return site


def put(page: Page, selector: str, value: str | int) -> None:
    """Give a control a value, as a person would."""
    element = f"document.querySelector({json.dumps(selector)})"
    page.run(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('input'))")


def shown(page: Page) -> np.ndarray:
    """Return the picture that the page shows, uint8 [H, W, 3]."""
    address = page.run("document.querySelector('#picture').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def assert_same(found: np.ndarray, right: np.ndarray) -> None:
    """Assert FORMAT.md's bound of a whole chain in fp32: one level, in a thousandth of the values."""
    assert found.shape == right.shape
    differs = np.abs(found.astype(int) - right)
    assert differs.max() <= 1 and (differs > 0).mean() <= 1e-3, (differs.max(), (differs > 0).mean())


@contextlib.contextmanager
def visited(browser: Page, url: str) -> Iterator[Page]:
    """Open a site. When the test has ended, no request may have left its server, nor may anything have gone wrong."""
    browser.events.clear()
    browser.open(url)
    yield browser
    browser.run("1")  # so that the events so far are read
    asked = [p["request"]["url"] for m, p in browser.events if m == "Network.requestWillBeSent"]
    servers = {"/".join(address.split("/")[:3]) for address in asked if not address.startswith(("blob:", "data:"))}
    assert servers == {"/".join(url.split("/")[:3])}
    assert problems(browser) == []
    browser.open("about:blank#")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Page]:
    with chromium(downloads) as page:
        page.view(1200, 900)
        yield page


@pytest.fixture(scope="module")
def demo_site(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's site, `demo` in a folder of its own."""
    return export(demo, tmp_path_factory.mktemp("sites") / "demo")


@pytest.fixture(scope="module")
def small_site(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD miniature's, of 64x64, from text and from pictures."""
    return export(sd, tmp_path_factory.mktemp("small") / "site")


def test_the_demo_models_pictures_are_pythons(browser: Page, demo: Path, demo_site: Path, downloads: Path) -> None:
    """At 512x512 in WebAssembly, from a folder below a path of a server that sends no headers; then from the cache."""
    with static(demo_site.parent) as server, Pipeline.load(demo, **ON) as pipe:
        with visited(browser, f"{server.url}/demo/") as page:
            put(page, "#prompt", PROMPT)  # it waits until the model is here
            page.wait(OPEN, LONG)
            put(page, "#steps", 1)  # of 1, 2 and 4
            page.wait(f"{KEPT} === 1", LONG)
            assert "2 steps" in text(page, "#latency")
            assert_same(shown(page), pipe(PROMPT, seed=0, num_inference_steps=2, output_type="uint8").images[0])
            page.click("#save")
            put(page, "#steps", 0)
            page.wait(f"{KEPT} === 2", LONG)
            assert_same(shown(page), pipe(PROMPT, seed=0, num_inference_steps=1, output_type="uint8").images[0])
            assert not page.run("crossOriginIsolated")
            assert text(page, "#connection-text") == "WebAssembly"
            assert "no WebGPU" in text(page, "#notice")
        (saved,) = downloads.iterdir()
        assert saved.name.endswith("-0.png")
        assert_same(np.asarray(Image.open(saved)), pipe(PROMPT, seed=0, num_inference_steps=2, output_type="uint8").images[0])
        assert any("/graphs/" in path for path in server.asked)
        server.asked.clear()
        with visited(browser, f"{server.url}/demo/") as page:
            page.wait(OPEN, LONG)
            assert "/demo/bundle/bundle.json" in server.asked
            assert not [path for path in server.asked if "/graphs/" in path or "/tables/" in path]


def test_a_dropped_picture_is_the_start_of_what_is_drawn(
    browser: Page, sd: Path, small_site: Path, tmp_path: Path
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    data = {"items": [], "files": [str(tmp_path / "photo.png")], "dragOperationsMask": 1}
    with static(small_site) as server, visited(browser, server.url) as page, Pipeline.load(sd, **ON) as pipe:
        page.wait(OPEN, LONG)
        put(page, "#prompt", "a cat")
        page.wait(f"{KEPT} === 1", LONG)
        assert_same(shown(page), pipe("a cat", seed=0, num_inference_steps=4, output_type="uint8").images[0])
        for kind in ("dragEnter", "dragOver", "drop"):
            page.call("Input.dispatchDragEvent", type=kind, x=600, y=400, data=data)
        page.wait(f"{KEPT} === 2", LONG)
        call = {"image": photo, "strength": 0.5, "num_inference_steps": 4}
        assert_same(shown(page), pipe("a cat", seed=0, **call, output_type="uint8").images[0])
        page.click("#clear")
        page.wait(f"{KEPT} === 3", LONG)
        page.click("#camera-button")
        before = page.run("document.querySelector('#picture').toDataURL()")
        page.wait(f"document.querySelector('#picture').toDataURL() !== {json.dumps(before)}", LONG)
        page.click("#camera-button")
