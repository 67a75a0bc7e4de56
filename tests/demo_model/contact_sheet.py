"""A dozen prompts and seeds: our picture, diffusers' picture, and how they differ.

python tests/demo_model/contact_sheet.py demo.bundle -o demo.png
"""

import argparse
from pathlib import Path

import numpy as np
import scenes
import score
from grade import theirs
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from turbochain.runtime import Pipeline

AMPLIFIED = 100
SIDE, GAP, CAPTION, COLUMNS = 150, 6, 34, 3
HEAD = f"turbochain  |  diffusers  |  difference x {AMPLIFIED}"


def asked() -> list[tuple[scenes.Scene, int]]:
    """The prompts, never trained on, and their seeds: four of one object (one of them twice), the rest of two."""
    single, double = scenes.held_out(3, 0, seed=1), scenes.held_out(0, 8, seed=1)
    return [(scene, seed) for seed, scene in enumerate([single[0], *single, *double])]


def main() -> None:
    """Draw them and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    draw, cells, right, largest = theirs(), [], 0, 0
    with Pipeline.load(arguments.bundle) as pipe:
        for scene, seed in asked():
            ours = pipe(str(scene), seed=seed, output_type="uint8").images[0]
            diffusers = draw(str(scene), seed, 1)
            difference = np.abs(ours.astype(int) - diffusers)
            amplified = np.minimum(difference * AMPLIFIED, 255).astype(np.uint8)
            cells.append(cell(f"{scene}  (seed {seed})", ours, diffusers, amplified))
            right += not score.faults(ours, scene)
            largest = max(largest, int(difference.max()))
    sheet(cells).save(arguments.output)
    print(f"{arguments.output}: {right} of {len(cells)} pictures show what their prompt says;", end=" ")
    print(f"they differ from diffusers' by at most {largest} of 255 levels")


def cell(prompt: str, *shown: NDArray[np.uint8]) -> Image.Image:
    """Pictures side by side above their prompt."""
    image = Image.new("RGB", (3 * SIDE, SIDE + CAPTION), "white")
    for i, picture in enumerate(shown):
        image.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i * SIDE, 0))
    words, lines = prompt.split(" "), [""]
    font = ImageFont.load_default(12)
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= 3 * SIDE else [lines[-1], word]
    ImageDraw.Draw(image).text((2, SIDE + 2), "\n".join(lines), "black", font, spacing=2)
    return image


def sheet(cells: list[Image.Image]) -> Image.Image:
    """All cells in a grid."""
    width, height = cells[0].width + 2 * GAP, cells[0].height + GAP
    image = Image.new("RGB", (COLUMNS * width, 24 + -(-len(cells) // COLUMNS) * height), "white")
    ImageDraw.Draw(image).text((GAP, 4), HEAD, "black", ImageFont.load_default(14))
    for i, each in enumerate(cells):
        image.paste(each, (i % COLUMNS * width + GAP, 24 + i // COLUMNS * height))
    return image


if __name__ == "__main__":
    main()
