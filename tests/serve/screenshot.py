"""Take README's picture of the page: `PYTHONPATH=benchmarks python tests/serve/screenshot.py demo.bundle`."""

import argparse
import io
from pathlib import Path

from PIL import Image
from serving import serving

from chromium import chromium

SIZE = (1200, 972)
PROMPTS = (
    "a small green triangle on a white background",
    "a large blue square on a green background",
    "a small yellow circle above a large red square on a blue background",
    "a large white triangle right of a small red circle on a purple background",
    "a large red circle left of a small blue square on a yellow background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("page.png"))
    given = parser.parse_args()
    with serving(given.bundle) as served, chromium() as page:
        page.view(*SIZE)
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.open(served.url)
        page.wait("document.querySelector('#connection').dataset.state === 'open'")
        for count, prompt in enumerate(PROMPTS, 1):
            page.run("document.querySelector('#prompt').select()")
            page.type("#prompt", prompt)
            page.wait(f"document.querySelectorAll('#gallery li').length === {count}", 60)
        page.wait("document.getAnimations().length === 0")
        page.screenshot(given.output)
    file = io.BytesIO()
    Image.open(given.output).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    given.output.write_bytes(file.getvalue())


if __name__ == "__main__":
    main()
