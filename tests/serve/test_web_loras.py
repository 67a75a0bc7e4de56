"""The page's weights of LoRAs, in a headless Chromium: `make check-web`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import lora_files
import numpy as np
import pytest
from serving import serving
from test_lora_slots import draw
from test_web import KEPT, as_jpeg, opened, problems, sent, shown

from chromium import Page, chromium, executable
from turbochain.runtime import Pipeline

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed: Debian's package is chromium"),
]

WEIGHTS = """[...document.querySelectorAll("#loras li")].map(item =>
  [item.querySelector("label").textContent, item.querySelector("input").value])"""


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], reference_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    shutil.copy(reference_lora, folder / "ink.safetensors")
    lora_files.write(folder / "pixel art.safetensors", draw(checkpoints["sd"], seed=2, ranks=(3,)), "kohya")
    return folder


@pytest.fixture(scope="module")
def page(slotted: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with serving(slotted, lora_dir=str(folder), backend="onnxruntime") as served, chromium() as browser:
        browser.view(1200, 900)
        with opened(browser, served) as page:
            yield page
            assert problems(page) == []


def test_each_has_a_weight_which_goes_with_every_message(page: Page, slotted: Path, folder: Path) -> None:
    with Pipeline.load(slotted, threads=1, backend="onnxruntime") as pipe:
        for name in ("ink", "pixel art"):
            pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)

        def assert_shown(**weights: float) -> None:
            pipe.set_adapters([name.replace("_", " ") for name in weights], list(weights.values()))
            right = pipe("a", seed=[0], num_inference_steps=2, output_type="uint8").images[0]
            assert np.abs(shown(page).astype(int) - as_jpeg(right)).max() <= 3

        assert page.run(WEIGHTS) == [["inkoff", "0"], ["pixel artoff", "0"]]
        page.type("#prompt", "a")
        page.wait(f"{KEPT} === 1")
        assert all("loras" not in message for message, _ in sent(page))
        assert_shown()
        page.run("document.querySelector('#loras input').focus()")
        for _ in range(3):
            page.press("ArrowRight")
        page.wait(f"{KEPT} === 2")
        assert [message.get("loras") for message, _ in sent(page)][-1] == [{"name": "ink", "scale": 0.15}]
        assert_shown(ink=0.15)
        put(page, 1, -0.5)
        page.wait(f"{KEPT} === 3")
        assert page.run(WEIGHTS) == [["ink0.15", "0.15"], ["pixel art-0.50", "-0.5"]]
        assert_shown(ink=0.15, pixel_art=-0.5)
        put(page, 0, 0)
        page.wait(f"{KEPT} === 4")
        assert sent(page)[-1][0]["loras"] == [{"name": "pixel art", "scale": -0.5}]
        assert_shown(pixel_art=-0.5)
        count = len(sent(page))
        page.click("#gallery li:nth-child(3) button")  # the second picture: its weights come back with it
        page.wait("document.querySelector('#loras input').value === '0.15'")
        assert page.run(WEIGHTS) == [["ink0.15", "0.15"], ["pixel artoff", "0"]]
        assert_shown(ink=0.15)
        assert len(sent(page)) == count  # nothing is drawn anew


def test_they_have_names(page: Page) -> None:
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    names = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes}
    assert ("group", "LoRAs") in names
    assert {name.split()[0] for role, name in names if role == "slider"} == {"Steps", "ink", "pixel"}, names


def put(page: Page, at: int, weight: float) -> None:
    slider = f"document.querySelectorAll('#loras input')[{at}]"
    page.run(f"{slider}.value = {json.dumps(weight)}; {slider}.dispatchEvent(new Event('input'))")
