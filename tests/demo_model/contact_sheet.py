"""A dozen prompts and seeds: our picture, diffusers' picture, and how they differ; then three pictures recoloured.

python tests/demo_model/contact_sheet.py demo.bundle -o demo.png
"""

import argparse
from dataclasses import replace
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
RECOLOURED = f"image-to-image: the picture that was given  |  turbochain  |  difference from diffusers x {AMPLIFIED}"
STRENGTH, STEPS, AGAIN = 0.75, 4, (5, 7, 9)


def asked() -> list[tuple[scenes.Scene, int]]:
    """The prompts, never trained on, and their seeds: four name one object (one of these twice), the rest two."""
    single, double = scenes.held_out(3, 0, seed=1), scenes.held_out(0, 8, seed=1)
    return [(scene, seed) for seed, scene in enumerate([single[0], *single, *double])]


def recoloured(scene: scenes.Scene) -> scenes.Scene:
    """The same objects in each other colour than before, on a ground of another."""
    colours = [*scenes.COLOURS]
    used = {scene.background, *(thing.colour for thing in scene.things)}
    others = iter([colour for colour in colours if colour not in used])
    things = tuple(replace(thing, colour=next(others)) for thing in scene.things)
    return replace(scene, things=things, background=next(others))


def main() -> None:
    """Draw them and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    draw, cells, again, right, largest = theirs(), [], [], 0, 0
    with Pipeline.load(arguments.bundle) as pipe:
        for scene, seed in asked():
            ours = pipe(str(scene), seed=seed, output_type="uint8").images[0]
            diffusers = draw(str(scene), seed, 1)
            cells.append(cell(f"{scene}  (seed {seed})", ours, diffusers, difference(ours, diffusers, AMPLIFIED)))
            right += not score.faults(ours, scene)
            largest = max(largest, int(difference(ours, diffusers).max()))
            if seed in AGAIN:
                scene, given = recoloured(scene), Image.fromarray(ours)
                how = {"image": given, "strength": STRENGTH, "num_inference_steps": STEPS, "seed": seed}
                ours = pipe(str(scene), **how, output_type="uint8").images[0]
                diffusers = draw(str(scene), seed, STEPS, image=given, strength=STRENGTH)
                shown = (np.asarray(given), ours, difference(ours, diffusers, AMPLIFIED))
                again.append(cell(f"{scene}  (strength {STRENGTH})", *shown))
                right += not score.faults(ours, scene)
                largest = max(largest, int(difference(ours, diffusers).max()))
    sheet({HEAD: cells, RECOLOURED: again}).save(arguments.output)
    print(f"{arguments.output}: {right} of {len(cells) + len(again)} pictures show what their prompt says;", end=" ")
    print(f"they differ from diffusers' by at most {largest} of 255 levels")
    if largest > 1:
        raise SystemExit("a picture differs from diffusers' by more than 1 level")


def difference(ours: NDArray[np.uint8], diffusers: NDArray[np.uint8], amplified: int = 1) -> NDArray[np.uint8]:
    """How far two pictures are apart, in levels, many times that if it is to be seen."""
    return np.minimum(np.abs(ours.astype(int) - diffusers) * amplified, 255).astype(np.uint8)


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


def sheet(parts: dict[str, list[Image.Image]]) -> Image.Image:
    """The cells of each part in a grid, below its heading."""
    one = next(iter(parts.values()))[0]
    width, height = one.width + 2 * GAP, one.height + GAP
    rows = {heading: -(-len(cells) // COLUMNS) for heading, cells in parts.items()}
    image = Image.new("RGB", (COLUMNS * width, sum(24 + count * height for count in rows.values())), "white")
    top = 0
    for heading, cells in parts.items():
        ImageDraw.Draw(image).text((GAP, top + 4), heading, "black", ImageFont.load_default(14))
        for i, each in enumerate(cells):
            image.paste(each, (i % COLUMNS * width + GAP, top + 24 + i // COLUMNS * height))
        top += 24 + rows[heading] * height
    return image


if __name__ == "__main__":
    main()
