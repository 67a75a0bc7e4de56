"""The page's drawing that a picture follows, in a headless Chromium: `make check-web`."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from serving import Serving, serving
from test_web import KEPT, as_jpeg, opened, problems, sent, shown

from chromium import Page, chromium, executable
from turbochain.runtime import Pipeline

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed: Debian's package is chromium"),
]

FRAME, SKETCH = "document.querySelector('#frame')", "document.querySelector('#sketch')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("downloads")) as page:
        page.view(1200, 1400)
        yield page


@pytest.fixture(scope="module")
def served(controlled: Path) -> Iterator[Serving]:
    with serving(controlled, backend="onnxruntime") as found:
        yield found


@pytest.fixture(scope="module")
def pipe(controlled: Path) -> Iterator[Pipeline]:
    with Pipeline.load(controlled, threads=1, backend="onnxruntime") as pipe:
        yield pipe


@pytest.fixture
def page(browser: Page, served: Serving) -> Iterator[Page]:
    with opened(browser, served) as page:
        page.type("#prompt", "a")
        page.wait(f"{KEPT} === 1")
        page.click("#control-on")
        yield page
        assert problems(page) == []


def drag(page: Page, *places: tuple[float, float], touch: bool = False) -> None:
    """Draw a line through places, in shares of the canvas, without a pause, after which a picture would be kept."""
    page.run(f"{SKETCH}.scrollIntoView({{block: 'center'}})")
    x, y, width, height = page.run(f"(r => [r.x, r.y, r.width, r.height])({SKETCH}.getBoundingClientRect())")
    points = [(x + width * across, y + height * down) for across, down in places]
    if touch:
        touches = [("touchStart", points[:1]), *(("touchMove", [point]) for point in points[1:]), ("touchEnd", [])]
        each = [{"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in at]} for kind, at in touches]
        page.calls("Input.dispatchTouchEvent", *each)
        return
    kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
    held = {"button": "left", "buttons": 1, "clickCount": 1}
    page.calls(
        "Input.dispatchMouseEvent",
        *({"type": kind, "x": x, "y": y, **held} for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True)),
    )


def put(page: Page, selector: str, value: str) -> None:
    """Give a slider or a list a value, as a person would."""
    element = f"document.querySelector({json.dumps(selector)})"
    page.run(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('input'))")


def settled(page: Page, kept: int) -> tuple[dict[str, Any], np.ndarray]:
    """Wait until so many pictures are kept; return the last message and its drawing."""
    page.wait(f"{KEPT} === {kept}")
    message, file = sent(page)[-1]
    assert message["control_bytes"] == len(file)
    return message, np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def assert_follows(page: Page, pipe: Pipeline, drawing: np.ndarray, **more: Any) -> None:
    call = {"controlnet": "canny", "controlnet_conditioning_scale": 1.0, "num_inference_steps": 2, "seed": [0]}
    right = as_jpeg(pipe("a", control_image=drawing, output_type="uint8", **call | more).images[0])
    assert np.abs(shown(page).astype(int) - right).max() <= 3


def test_a_picture_follows_what_is_drawn(page: Page, pipe: Pipeline) -> None:
    before = shown(page)
    drag(page, (0.1, 0.5), (0.5, 0.5), (0.9, 0.5))
    message, drawing = settled(page, 2)
    assert (message["controlnet"], message["controlnet_conditioning_scale"]) == ("canny", 1)
    assert "canny" not in message and drawing.shape == (64, 64, 3)
    assert drawing[32, 10:54].min() > 200 and drawing[:24].max() == 0  # a white line on black
    assert_follows(page, pipe, drawing)
    assert (shown(page) != before).any()
    steps = [m["num_inference_steps"] for m, _ in sent(page) if "control_bytes" in m]
    assert steps[0] == 1 and steps[-1] == 2  # the fewest while the line grows, and the slider's at rest

    drag(page, (0.5, 0.1), (0.5, 0.3), touch=True)
    _, more = settled(page, 3)
    assert more[10:18, 32].min() > 200 and (more[32] == drawing[32]).all()
    page.click("#undo")
    _, undone = settled(page, 4)
    np.testing.assert_array_equal(undone, drawing)
    page.click("#wipe")
    page.wait(f"{KEPT} === 5")
    assert "control_bytes" not in sent(page)[-1][0]  # nothing is left to follow
    np.testing.assert_array_equal(shown(page), before)


def test_keys_draw_too(page: Page, pipe: Pipeline) -> None:
    page.run(f"{SKETCH}.focus()")
    page.press("Tab")  # so that the focus is a keyboard's
    page.run(f"{SKETCH}.focus()")
    for key in (" ", *["ArrowRight"] * 20, " ", *["ArrowDown"] * 8):
        page.press(key)
    _, drawing = settled(page, 2)
    assert drawing[32, 33:50].min() > 200 and drawing[37:].max() == 0  # down, lifted, and moved on
    assert_follows(page, pipe, drawing)
    assert not page.run("document.querySelector('#pen').hidden")
    assert "Space puts it down" in page.run("document.querySelector('#sketch-hint').textContent")


def test_the_edges_of_a_chosen_picture_are_followed(page: Page, pipe: Pipeline, tmp_path: Path) -> None:
    photo = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8), (0, 0), 5)
    Image.fromarray(cv2.normalize(photo, None, 0, 255, cv2.NORM_MINMAX)).save(tmp_path / "photo.png")
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#control-file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "photo.png")])
    message, picture = settled(page, 2)
    assert message["canny"] == [100, 200]
    assert_follows(page, pipe, cv2.Canny(picture, 100, 200))
    put(page, "#low", "40")
    message, picture = settled(page, 3)
    assert message["canny"] == [40, 200]
    assert_follows(page, pipe, cv2.Canny(picture, 40, 200))
    page.click("#edges")
    message, picture = settled(page, 4)
    assert "canny" not in message
    assert_follows(page, pipe, picture)


def test_scale_and_network_are_chosen_and_come_back_with_a_picture(page: Page, pipe: Pipeline) -> None:
    drag(page, (0.2, 0.2), (0.8, 0.8))
    _, drawing = settled(page, 2)
    put(page, "#control-scale", "0.5")
    message, _ = settled(page, 3)
    assert message["controlnet_conditioning_scale"] == 0.5
    assert_follows(page, pipe, drawing, controlnet_conditioning_scale=0.5)
    page.run(
        "(e => { e.value = 'sketch'; e.dispatchEvent(new Event('input')); })(document.querySelector('#control-net'))"
    )
    message, _ = settled(page, 4)
    assert message["controlnet"] == "sketch"
    more = {"controlnet": None, "controlnet_conditioning_scale": None}
    of_adapter = {"t2i_adapter": "sketch", "adapter_conditioning_scale": 0.5}
    assert_follows(page, pipe, drawing, **more, **of_adapter)
    count = len(sent(page))
    page.click("#gallery li:nth-child(3) button")
    page.wait("document.querySelector('#control-scale').value === '1'")
    assert page.run("document.querySelector('#control-net').value") == "canny"
    assert_follows(page, pipe, drawing)
    assert len(sent(page)) == count  # nothing is drawn anew


def test_the_camera_is_followed(page: Page) -> None:
    before = len(sent(page))
    page.click("#control-camera-button")
    page.wait("document.querySelector('#control-camera-button').textContent === 'Stop'")
    first = page.run("document.querySelector('#latency').textContent")
    page.wait(f"document.querySelector('#latency').textContent !== {json.dumps(first)}")
    page.click("#control-camera-button")
    frames = [(message, file) for message, file in sent(page)[before:] if "control_bytes" in message]
    assert frames
    assert all(Image.open(io.BytesIO(file)).size == (64, 64) for _, file in frames)


def test_its_controls_have_names_and_a_phone_needs_no_scrolling_aside(page: Page) -> None:
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    names = {(n["role"]["value"], n.get("name", {}).get("value", "").split(" 1")[0]) for n in nodes}
    wanted = {("application", "Drawing to follow"), ("checkbox", "Follow a drawing"), ("checkbox", "Follow its edges")}
    wanted |= {("button", "Undo"), ("button", "Clear the drawing"), ("button", "Choose a picture to follow")}
    assert wanted <= names, names
    assert all(name for role, name in names if role in ("slider", "button", "combobox", "checkbox")), names
    page.view(360, 740, touch=True)
    try:
        assert page.run("document.documentElement.scrollWidth") <= 360
        page.run(f"{SKETCH}.scrollIntoView({{block: 'center'}})")
        places = [page.run(f"(r => [r.top, r.bottom])({of}.getBoundingClientRect())") for of in (FRAME, SKETCH)]
        (top, bottom), (sketch_top, sketch_bottom) = places
        assert 0 <= top < bottom <= sketch_top < sketch_bottom <= 740  # who draws sees the picture, too
    finally:
        page.view(1200, 1400)
