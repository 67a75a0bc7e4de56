"""The page of `turbochain export-web`, which draws by itself, in a headless Chromium: `make check-web`."""

import base64
import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ON, ROOT
from here import build_here
from PIL import Image
from serving import serving
from static import static
from test_web import KEPT, OPEN, contrast, problems

from chromium import Page, chromium, executable
from turbochain.runtime import Pipeline
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.web import export_web

PACKAGES = ROOT / ".node" / "node_modules"

pytestmark = [
    pytest.mark.web,
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed: Debian's package is chromium"),
    pytest.mark.skipif(not PACKAGES.is_dir(), reason="npm's packages are not installed: make test installs them"),
]

PROMPT = "a large red circle left of a small blue square on a yellow background"
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
LONG = 120.0  # seconds: these pictures are drawn by a processor that has other things to do
LOST = "document.querySelector('#connection').dataset.state === 'lost'"
OFFER = "document.querySelector('#arrival-button').checkVisibility()"
DRAWING = "'drawing' in document.querySelector('#frame').dataset"
TICKS = f"""new Promise(done => {{
  let ticks = 0;
  const tick = () => {DRAWING} ? setTimeout(tick, 10, ticks++) : done(ticks);
  tick();
}})"""


def text(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def export(bundle: Path, folder: Path) -> Path:
    """Write a bundle's site, and its engine, which the bundle does not get."""
    build_here(str(bundle), backend="web", device="cpu", engines=folder / "engines", quiet=True)
    return export_web(bundle, folder / "site", engines=folder / "engines", node_modules=PACKAGES)


def changed(site: Path, folder: Path, **sizes: int) -> Path:
    """Return a copy of a site whose manifest tells other sizes of these files."""
    copy = shutil.copytree(site, folder / "site")
    manifest = copy / "bundle" / "bundle.json"
    found = json.loads(manifest.read_text())
    for name, size in sizes.items():
        found["files"].setdefault(name, {"sha256": "0" * 64})["size"] = size
    manifest.write_text(json.dumps(found))
    return copy


def put(page: Page, selector: str, value: str | int) -> None:
    """Give a control a value, as a person does."""
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
    assert wrong(browser) == []
    browser.open("about:blank#")


def wrong(page: Page) -> list[str]:
    """Return what went wrong in a page; to have no WebGPU is no fault."""
    return [problem for problem in problems(page) if problem != "No available adapters."]


@pytest.fixture(scope="module")
def demo_site(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's."""
    return export(demo, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def small_site(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD miniature's, of 64x64, from text and from pictures."""
    return export(sd, tmp_path_factory.mktemp("small"))


def test_the_demo_models_pictures_are_pythons(browser: Page, demo: Path, demo_site: Path, downloads: Path) -> None:
    """At 512x512 in WebAssembly, below a path of a server that sends no headers of ours; then from the cache."""
    with Pipeline.load(demo, **ON) as pipe:
        right = [pipe(PROMPT, seed=0, num_inference_steps=n, output_type="uint8").images[0] for n in (1, 2, 4)]
    with static(demo_site.parent) as server:
        with visited(browser, f"{server.url}/site/") as page:
            put(page, "#prompt", PROMPT)  # it waits until the model is here
            page.wait(OPEN, LONG)
            page.wait(f"{KEPT} === 1", LONG)
            assert_same(shown(page), right[2])
            put(page, "#steps", 1)  # of 1, 2 and 4
            page.wait(f"{KEPT} === 2", LONG)
            assert "2 steps" in text(page, "#latency")
            assert_same(shown(page), right[1])
            page.click("#save")
            put(page, "#steps", 0)
            page.wait(DRAWING)
            assert page.run(TICKS) > 5  # the page is alive meanwhile
            page.wait(f"{KEPT} === 3", LONG)
            assert_same(shown(page), right[0])
            assert not page.run("crossOriginIsolated")
            assert text(page, "#connection-text") == "WebAssembly"
            assert "no WebGPU" in text(page, "#notice")
        (saved,) = downloads.iterdir()
        assert saved.name.endswith("-0.png")
        assert_same(np.asarray(Image.open(saved).convert("RGB")), right[1])
        assert any("/graphs/" in path for path in server.asked)
        server.asked.clear()
        with visited(browser, f"{server.url}/site/?again") as page:
            page.wait(OPEN, LONG)
            assert [path for path in server.asked if path.startswith("/site/bundle/")] == ["/site/bundle/bundle.json"]


def test_the_newest_request_wins(browser: Page, small_site: Path) -> None:
    with static(small_site) as server, visited(browser, server.url) as page:
        page.wait(OPEN, LONG)
        page.run("""
          window.pictures = [];
          const canvas = document.querySelector('#picture'), prompt = document.querySelector('#prompt');
          const note = () => pictures.push(canvas.ariaLabel);
          new MutationObserver(note).observe(canvas, {attributeFilter: ['aria-label']});
          for (const text of ['one', 'two', 'three']) {
            prompt.value = text;
            prompt.dispatchEvent(new Event('input'));
          }
        """)
        page.wait(f"{KEPT} === 1", LONG)
        assert page.run("window.pictures") == ["three", "three"]  # with the fewest steps, then with the slider's


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
        call = {"image": Image.fromarray(photo), "strength": 0.5, "num_inference_steps": 4}
        assert_same(shown(page), pipe("a cat", seed=0, **call, output_type="uint8").images[0])
        before = page.run("document.querySelector('#picture').toDataURL()")
        page.click("#camera-button")
        page.wait(f"document.querySelector('#picture').toDataURL() !== {json.dumps(before)}", LONG)
        page.click("#camera-button")


def test_a_damaged_file_is_refused_before_it_is_parsed(browser: Page, small_site: Path, tmp_path: Path) -> None:
    site = shutil.copytree(small_site, tmp_path / "site")  # no links: the true files stay
    graph = site / "bundle/graphs/text_encoder.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with static(site) as server:
        browser.events.clear()
        browser.open(server.url)
        browser.wait(LOST, LONG)
        said = text(browser, "#problem")
        assert "graphs/text_encoder.onnx" in said and "SHA-256" in said
        assert not [path for path in server.asked if path.endswith(".wasm")]  # with which it would be parsed
        graph.write_bytes(whole)
        browser.click("#arrival-button")
        browser.wait(OPEN, LONG)
        assert text(browser, "#problem") == ""
        assert wrong(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_large_model_is_downloaded_when_somebody_asks_for_it(
    browser: Page, small_site: Path, tmp_path: Path, scheme: str
) -> None:
    """What is large is set to a kilobyte. The amount is that of the first task: more comes when it is used."""
    site = shutil.copytree(small_site, tmp_path / "site")
    part = site / "page" / "local.mjs"
    part.write_text(part.read_text().replace("const MUCH = 200e6", "const MUCH = 1e3"))
    manifest = json.loads((site / "bundle" / "bundle.json").read_text())
    read = {manifest["chains"]["text-to-image"]["tables_file"], "tokenizer.json"}
    for stage in manifest["chains"]["text-to-image"]["stages"]:
        graph = manifest["graphs"][stage["graph"]]
        read |= {graph["file"], *graph["data"]}
    amount = sum((site / "bundle" / name).stat().st_size for name in read) / 1e6
    expected = f"{amount:.{int(amount < 10)}f} MB"
    browser.view(360, 740, scheme=scheme, touch=True)
    try:
        with static(site) as server, visited(browser, server.url) as page:
            page.wait(OFFER)
            assert expected in text(page, "#arrival-button")
            assert not [path for path in server.asked if "/graphs/" in path]
            assert page.run("document.documentElement.scrollWidth") <= 360
            page.click("#arrival-button")
            page.wait(OPEN, LONG)
            assert not page.run("document.querySelector('#arrival').checkVisibility()")
            page.wait("document.getAnimations().length === 0")
            colors = page.run("""[[ '#notice', 'color'], ['body', 'backgroundColor']].map(([selector, which]) =>
              getComputedStyle(document.querySelector(selector))[which].match(/[\\d.]+/g).map(Number))""")
            assert contrast(colors[0][:3], colors[1][:3]) >= 4.5
    finally:
        browser.view(1200, 900)


MODULE = """(async () => {
  const { Pipeline } = await import('./turbochain.mjs');
  const told = [];
  const pipe = await Pipeline.load('bundle', { backend: 'wasm', progress: ({ cached }) => told.push(cached) });
  const { data } = await pipe('a cat', { seed: 7 });
  await pipe.close();
  return [told.every(Boolean), told.some(Boolean), data.reduce((sum, level) => (31 * sum + level) % 65521, 0)];
})()"""


def test_a_cache_that_is_damaged_full_or_broken(browser: Page, small_site: Path) -> None:
    """By the module alone: what is not right there is downloaded again, and kept if there is room."""
    with static(small_site) as server, visited(browser, f"{server.url}/?backend=none") as page:  # it loads nothing
        _, _, right = page.run(MODULE)
        assert page.run(MODULE) == [True, True, right]
        page.run("""(async () => {
          for (const name of await caches.keys()) {
            const cache = await caches.open(name);
            for (const [i, request] of (await cache.keys()).entries()) {
              const bytes = new Uint8Array(await (await cache.match(request)).arrayBuffer());
              bytes[i % bytes.length] ^= 1;
              await cache.put(request, new Response(i % 2 ? bytes : bytes.slice(1)));
            }
          }
        })()""")
        assert page.run(MODULE) == [False, True, right]  # what is damaged was read too
        assert page.run(MODULE) == [True, True, right]
        page.run("caches.keys().then((names) => Promise.all(names.map((name) => caches.delete(name))))")
        full = "Cache.prototype.put = () => Promise.reject(new DOMException('no room', 'QuotaExceededError'))"
        page.run(f"{full}; 0")
        assert page.run(MODULE) == page.run(MODULE) == [False, False, right]
        page.run("Cache.prototype.match = Cache.prototype.keys = () => Promise.reject(new DOMException('x')); 0")
        assert page.run(MODULE) == [False, False, right]
        page.run("CacheStorage.prototype.open = () => { throw new DOMException('x', 'SecurityError') }; 0")
        assert page.run(MODULE) == [False, False, right]


def test_a_model_that_cannot_run_here_is_not_downloaded(browser: Page, small_site: Path, tmp_path: Path) -> None:
    (data,) = (small_site / "bundle/graphs").glob("unet*.data")
    site = changed(small_site, tmp_path, **{f"graphs/{data.name}": 3 << 30})
    with static(site) as server, visited(browser, server.url) as page:
        page.wait(LOST)
        assert "no WebGPU" in text(page, "#problem") and "GiB" in text(page, "#problem")
        assert not [path for path in server.asked if "/graphs/" in path]


def test_the_server_isolates_the_page_so_that_webassembly_has_threads(
    browser: Page, sd: Path, small_site: Path
) -> None:
    with serving(sd, web=str(small_site)) as served, visited(browser, f"{served.url}/web/") as page:
        page.wait(OPEN, LONG)
        assert page.run("crossOriginIsolated")
        put(page, "#prompt", "a cat")
        page.wait(f"{KEPT} === 1", LONG)
        with Pipeline.load(sd, **ON) as pipe:
            assert_same(shown(page), pipe("a cat", seed=0, num_inference_steps=4, output_type="uint8").images[0])


def test_webgpu_draws_pythons_picture(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The miniature at 128x128, on a GPU of software."""
    bundle = tmp_path / "x.bundle"
    how = {"precision": "fp32", "size": (128, 128), "steps": [2], "tasks": [TEXT_TO_IMAGE]}
    build_here(str(checkpoints["sd"]), bundle, **how, quiet=True, **ON)
    site = export(bundle, tmp_path)
    with chromium(None, *WEBGPU) as browser, static(site) as server, visited(browser, server.url) as page:
        page.wait(OPEN, LONG)
        assert text(page, "#connection-text") == "WebGPU"
        assert text(page, "#notice") == ""
        put(page, "#prompt", "a cat")
        page.wait(f"{KEPT} === 1", 3 * LONG)
        with Pipeline.load(bundle, **ON) as pipe:
            assert_same(shown(page), pipe("a cat", seed=0, num_inference_steps=2, output_type="uint8").images[0])
