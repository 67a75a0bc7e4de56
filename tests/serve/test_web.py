"""The page in a headless Chromium: `make check-web`."""

import base64
import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Serving, serving

import serve_page
from chromium import Page, executable
from turbochain.runtime import Pipeline
from turbochain.runtime.serve.encoding import Encoding
from turbochain.runtime.serve.errors import unavailable
from turbochain.runtime.serve.source import Drawn, Job, Progress, State

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed: Debian's package is chromium"),
]

OPEN = "document.querySelector('#connection').dataset.state === 'open'"
PIXELS = """(() => {
  const {width, height} = document.querySelector('#picture');
  const context = new OffscreenCanvas(width, height).getContext('2d');
  context.drawImage(document.querySelector('#picture'), 0, 0);
  return [...context.getImageData(0, 0, width, height).data];
})()"""
KEPT = "document.querySelectorAll('#gallery li').length"


class Instant:
    """A source that answers at once, first with `refusals`."""

    state = State(ready=True)

    def __init__(self, *refusals: Exception) -> None:
        self.refusals, self.asked = list(refusals), list[Job]()

    async def draw(self, job: Job, progress: Progress | None = None) -> Drawn:
        self.asked.append(job)
        if self.refusals:
            raise self.refusals.pop(0)
        return Drawn(np.full((64, 64, 3), 90, np.uint8), 0.001)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def pipe(sd: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd, threads=1) as pipe:
        yield pipe


@pytest.fixture
def page(browser: Page, server: Serving) -> Iterator[Page]:
    """The page of the shared server. Nothing may have gone wrong in it when the test has ended."""
    with opened(browser, server) as page:
        yield page
        assert problems(page) == []


@contextlib.contextmanager
def opened(browser: Page, served: Serving) -> Iterator[Page]:
    browser.events.clear()
    browser.open(served.url)
    browser.wait(OPEN)
    yield browser
    hosts = {p["request"]["url"].split("/")[2] for m, p in browser.events if m == "Network.requestWillBeSent"
             if not p["request"]["url"].startswith(("blob:", "data:"))}  # fmt: skip
    assert hosts == {served.url.removeprefix("http://")}
    browser.open("about:blank#")  # nothing is drawn for the next test


def problems(page: Page) -> list[str]:
    """Return what the console would show."""
    found = []
    for method, more in page.events:
        if method == "Log.entryAdded" and more["entry"]["level"] in ("error", "warning"):
            found.append(more["entry"]["text"])
        if method == "Runtime.exceptionThrown":
            found.append(str(more["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled":
            found.append(str(more["args"]))
    return found


def sent(page: Page) -> list[tuple[dict[str, Any], bytes]]:
    """Return the page's messages so far: their JSON, and the picture's file, if any."""
    page.run("1")  # so that the events so far are read
    found = []
    for method, more in page.events:
        if method == "Network.webSocketFrameSent":
            payload = more["response"]["payloadData"]
            if more["response"]["opcode"] == 1:
                found.append((json.loads(payload), b""))
            else:
                message = base64.b64decode(payload)
                end = 4 + int.from_bytes(message[:4], "little")
                found.append((json.loads(message[4:end]), message[end:]))
    return found


def shown(page: Page) -> np.ndarray:
    return np.array(page.run(PIXELS), np.uint8).reshape(64, 64, 4)[..., :3]


def as_jpeg(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(Encoding("jpeg").encode(picture))))


def assert_shown(page: Page, pipe: Pipeline, **call: Any) -> None:
    """Assert that the page shows the pipeline's picture; Chromium's JPEG decoder may round otherwise than Pillow's."""
    call["seed"] = [call["seed"]]
    right = as_jpeg(pipe(**call, output_type="uint8").images[0])
    assert np.abs(shown(page).astype(int) - right).max() <= 3


def test_every_key_draws_with_the_fewest_steps_and_silence_with_the_sliders(page: Page, pipe: Pipeline) -> None:
    page.type("#prompt", "cat")
    page.wait(f"{KEPT} === 1")
    page.press("Enter")  # draws now, and is no part of the prompt
    asked = [(message["prompt"], message["num_inference_steps"]) for message, _ in sent(page)]
    assert asked == [("c", 1), ("ca", 1), ("cat", 1), ("cat", 4), ("cat", 4)]
    assert_shown(page, pipe, prompt="cat", seed=0, num_inference_steps=4)
    assert "4 steps" in page.run("document.querySelector('#latency').textContent")
    assert "4 steps" in page.run("document.querySelector('#status').textContent")
    page.run("document.querySelector('#steps').focus()")
    page.press("ArrowLeft")
    page.wait(f"{KEPT} === 2")
    assert_shown(page, pipe, prompt="cat", seed=0, num_inference_steps=3)


def test_the_dice_draw_another_seed(page: Page, pipe: Pipeline) -> None:
    page.type("#prompt", "a")
    page.wait(f"{KEPT} === 1")
    page.click("#dice")
    page.wait(f"{KEPT} === 2")
    seed = int(page.run("document.querySelector('#seed').value"))
    assert seed != 0
    assert sent(page)[-1][0]["seed"] == seed
    assert_shown(page, pipe, prompt="a", seed=seed, num_inference_steps=4)


def test_saving_gives_the_picture_that_is_shown(page: Page, pipe: Pipeline, downloads: Path) -> None:
    assert page.run("document.querySelector('#save').disabled")
    page.type("#prompt", "A cat, ../here")
    page.wait(f"{KEPT} === 1")
    page.click("#save")
    file, end = downloads / "a-cat-here-0.jpg", time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        page.run("1")
    right = pipe("A cat, ../here", seed=[0], num_inference_steps=4, output_type="uint8").images[0]
    assert file.read_bytes() == Encoding("jpeg").encode(right)


def test_the_gallery_shows_a_picture_again(page: Page, pipe: Pipeline) -> None:
    for count, key in enumerate("ab", 1):
        page.type("#prompt", key)
        page.wait(f"{KEPT} === {count}")
    page.click("#dice")
    page.wait(f"{KEPT} === 3")
    count = len(sent(page))
    page.click("#gallery li:last-child button")
    assert page.run("[document.querySelector('#prompt').value, document.querySelector('#seed').value]") == ["a", "0"]
    assert_shown(page, pipe, prompt="a", seed=0, num_inference_steps=4)
    assert len(sent(page)) == count  # nothing is drawn anew


def test_a_dropped_picture_is_the_start_of_what_is_drawn(page: Page, pipe: Pipeline, tmp_path: Path) -> None:
    page.type("#prompt", "a")
    page.wait(f"{KEPT} === 1")
    before = shown(page)
    photo = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    data = {"items": [], "files": [str(tmp_path / "photo.png")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=600, y=400, data=data)
    page.wait(f"{KEPT} === 2")
    message, file = sent(page)[-1]
    assert (message["strength"], message["num_inference_steps"]) == (0.5, 4)
    image = Image.open(io.BytesIO(file))
    assert image.size == (64, 64)
    middle = Image.fromarray(photo).crop((10, 0, 30, 20)).resize((64, 64))  # the largest part of its shape
    assert np.abs(np.asarray(image).astype(int) - np.asarray(middle)).mean() < 30
    assert_shown(page, pipe, prompt="a", seed=0, image=image, strength=0.5, num_inference_steps=4)
    assert (shown(page) != before).any()

    page.type("#prompt", "b")
    page.wait(f"{KEPT} === 3")
    assert [m["num_inference_steps"] for m, _ in sent(page)][-2:] == [2, 4]  # one step makes none at half strength
    page.click("#clear")
    page.wait(f"{KEPT} === 4")
    assert_shown(page, pipe, prompt="ab", seed=0, num_inference_steps=4)


def test_the_cameras_frames_are_drawn_one_after_the_other(page: Page) -> None:
    page.click("#camera-button")
    page.wait("!document.querySelector('#picture').hidden")
    first = page.run(f"{PIXELS}.join()")
    page.wait(f"{PIXELS}.join() !== '{first}'")
    page.click("#camera-button")
    frames = sent(page)
    assert len(frames) >= 2
    assert all(Image.open(io.BytesIO(file)).size == (64, 64) for _, file in frames)
    assert page.run("document.querySelector('#camera').hidden")


def test_the_page_reconnects_to_a_server_that_starts_again(browser: Page, sd: Path) -> None:
    with serving(sd, source=Instant()) as served:
        browser.open(served.url)
        browser.wait(OPEN)
        browser.type("#prompt", "a")
        browser.wait(f"{KEPT} === 1")
    browser.wait("document.querySelector('#connection').dataset.state === 'lost'")
    browser.type("#prompt", "b")  # it is drawn when the server is there again
    source = Instant()
    with serving(sd, source=source, port=int(served.url.rpartition(":")[2])):
        browser.wait(OPEN)
        browser.wait(f"{KEPT} === 2")
        assert source.asked[0].request.prompts == ("ab",)
        browser.open("about:blank#")


def test_the_page_asks_for_a_key(browser: Page, sd: Path) -> None:
    source = Instant()
    with serving(sd, source=source, api_keys=("k3y/+",)) as served:
        browser.events.clear()
        browser.open(served.url)
        asked = "document.querySelector('#key-dialog').open"
        browser.wait(asked)
        browser.type("#key", "wrong\r")
        browser.wait("document.querySelector('#key-problem').textContent")
        browser.type("#key", "k3y/+\r")
        browser.wait(OPEN)
        assert not browser.run(asked)
        browser.type("#prompt", "a")
        browser.wait(f"{KEPT} === 1")
        assert source.asked[0].client == "key 0"
        browser.open(f"{served.url}/")  # the tab keeps it
        browser.wait(OPEN)
        refusals = [text for text in problems(browser) if "401" in text]
        assert refusals == problems(browser)
        assert len(refusals) == 2


def test_a_loading_server_is_waited_for(browser: Page, sd: Path) -> None:
    source = Instant(unavailable("the server is loading its model; try again soon", "starting"))
    with serving(sd, source=source) as served, opened(browser, served) as page:
        page.type("#prompt", "a")
        page.wait("document.querySelector('#problem').textContent.includes('loading')")
        page.wait("!document.querySelector('#picture').hidden")
        assert page.run("document.querySelector('#problem').textContent") == ""


def test_one_of_several_models_is_chosen(browser: Page, sd: Path) -> None:
    source = Instant()
    with serving(sd, sd, source=source, model_names=("one", "two")) as served, opened(browser, served) as page:
        page.type("#prompt", "a")
        page.wait(f"{KEPT} === 1")
        page.run("document.querySelector('#model').focus()")
        page.key("t")
        page.wait(f"{KEPT} === 2")
        assert (source.asked[0].model, source.asked[-1].model) == ("one", "two")
        assert problems(page) == []


def test_every_control_has_a_name(page: Page) -> None:
    page.type("#prompt", "a")
    page.wait(f"{KEPT} === 1")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert named["textbox"] == ["Prompt"]
    assert named["spinbutton"] == ["Seed"]
    assert len(named["slider"]) == 1 and named["slider"][0].startswith("Steps")
    assert set(named["button"]) == {
        "Another seed",
        "Choose a picture",
        "Camera",
        "Save picture",
        "Show again: a, seed 0",
    }
    assert "a" in named["image"]  # the picture's text is its prompt
    assert named["heading"][0] == "turbochain"
    assert "status" in named
    assert page.run("document.documentElement.lang") == "en"
    reached = []
    for _ in range(7):
        reached.append(page.run("document.activeElement.id"))
        page.press("Tab")
    assert reached == ["prompt", "seed", "dice", "steps", "choose", "camera-button", "save"]
    style = "getComputedStyle(document.activeElement)"
    assert page.run(f"{style}.outlineStyle") == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_a_phone_needs_no_scrolling_aside(page: Page, scheme: str) -> None:
    page.view(360, 740, scheme=scheme, touch=True)
    try:
        page.wait("document.getAnimations().length === 0")  # colours change softly
        assert page.run("document.documentElement.scrollWidth") <= 360
        colors = page.run("""['body', 'label', '#save', '#empty'].map(selector => {
          const style = getComputedStyle(document.querySelector(selector));
          return [style.color, style.backgroundColor].map(text => text.match(/[\\d.]+/g).map(Number));
        })""")
        card = page.run("getComputedStyle(document.querySelector('#controls')).backgroundColor.match(/[\\d.]+/g)")
        for color, back in colors:
            behind = [float(v) for v in card] if len(back) == 4 and back[3] == 0 else back
            assert contrast(color[:3], behind[:3]) >= 4.5
    finally:
        page.view(1200, 900)


def test_the_benchmark_measures_each_key(sd: Path, tmp_path: Path) -> None:
    serve_page.main([str(sd), "--keys", "3", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert len(found["milliseconds"]) == 3
    assert 0 < found["p50_ms"] <= found["p99_ms"]


def contrast(one: list[float], other: list[float]) -> float:
    """Return the ratio of WCAG 2."""

    def luminance(color: list[float]) -> float:
        linear = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
