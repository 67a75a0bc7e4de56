"""A dozen prompts and seeds: our picture, diffusers' picture, and how they differ; then four of them with the objects
elsewhere, by edges, and three recoloured.

python tests/demo_model/contact_sheet.py demo.bundle demo-control.bundle -o demo.png
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scenes
import score
from grade import Pictures, theirs
from grade_control import where
from PIL import Image, ImageDraw, ImageFont

from turbochain.runtime import Pipeline

AMPLIFIED = 100
SIDE, GAP, CAPTION, WIDTH = 150, 6, 34, 1386
HEAD = f"turbochain  |  diffusers  |  difference x {AMPLIFIED}"
RECOLOURED = f"image-to-image: the picture that was given  |  turbochain  |  difference from diffusers x {AMPLIFIED}"
STEERED = f"ControlNet: edges, the seed of above  |  turbochain  |  diffusers  |  difference x {AMPLIFIED}"
STRENGTH, STEPS, AGAIN, ELSEWHERE = 0.75, 4, (5, 7, 9), (0, 3, 4, 6)


Pair = tuple[Pictures, Pictures]
"""Our picture and diffusers'."""


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


@dataclass
class Drawn:
    """What was drawn so far: the cells below each heading, and what a program finds in our pictures."""

    cells: dict[str, list[Image.Image]] = field(default_factory=dict)
    right: int = 0
    largest: int = 0  # difference from diffusers, in levels

    def add(self, heading: str, caption: str, shown: tuple[Pictures, ...], pair: Pair, faults: list[str]) -> None:
        """Add a cell: what is shown, then the difference of our picture and diffusers' in `pair`."""
        made = cell(caption, *shown, difference(*pair, AMPLIFIED))
        self.cells.setdefault(heading, []).append(made)
        self.right += not faults
        self.largest = max(self.largest, int(difference(*pair).max()))


def main() -> None:
    """Draw them and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("steered", metavar="control_bundle", help="one with the ControlNet")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    with Pipeline.load(arguments.bundle) as pipe, Pipeline.load(arguments.steered) as steered:
        drawn = draw(pipe, steered)
    sheet(drawn.cells).save(arguments.output)
    count = sum(map(len, drawn.cells.values()))
    print(f"{arguments.output}: {drawn.right} of {count} pictures show what their prompt says;", end=" ")
    print(f"they differ from diffusers' by at most {drawn.largest} of 255 levels")
    if drawn.largest > 1:
        raise SystemExit("a picture differs from diffusers' by more than 1 level")


def draw(pipe: Pipeline, steered: Pipeline) -> Drawn:
    """Draw everything with our pipelines, without and with the ControlNet, and with diffusers'."""
    drawn, reference, plain = Drawn(), theirs(), {}
    for scene, seed in asked():
        pair = pipe(str(scene), seed=seed, output_type="uint8").images[0], reference(str(scene), seed, 1)
        drawn.add(HEAD, f"{scene}  (seed {seed})", pair, pair, score.faults(pair[0], scene))
        plain[seed] = scene, pair[0]
    for seed in ELSEWHERE:
        scene, _ = plain[seed]
        centres, edges = where(scene, seed)
        ours = steered(str(scene), control_image=edges, seed=seed, output_type="uint8").images[0]
        pair = ours, reference(str(scene), seed, 1, edges=edges)
        faults = score.faults(ours, scene) + score.misplaced(ours, scene, centres)
        drawn.add(STEERED, f"{scene}  (seed {seed})", (np.stack([edges] * 3, -1), *pair), pair, faults)
    for seed in AGAIN:
        before, given = plain[seed]
        scene, how = recoloured(before), {"image": Image.fromarray(given), "strength": STRENGTH}
        ours = pipe(str(scene), **how, num_inference_steps=STEPS, seed=seed, output_type="uint8").images[0]
        pair = ours, reference(str(scene), seed, STEPS, **how)
        drawn.add(RECOLOURED, f"{scene}  (strength {STRENGTH})", (given, ours), pair, score.faults(ours, scene))
    return drawn


def difference(ours: Pictures, diffusers: Pictures, amplified: int = 1) -> Pictures:
    """How far two pictures are apart, in levels, many times that if it is to be seen."""
    return np.minimum(np.abs(ours.astype(int) - diffusers) * amplified, 255).astype(np.uint8)


def cell(prompt: str, *shown: Pictures) -> Image.Image:
    """Pictures side by side above their prompt."""
    image = Image.new("RGB", (len(shown) * SIDE, SIDE + CAPTION), "white")
    for i, picture in enumerate(shown):
        image.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i * SIDE, 0))
    words, lines = prompt.split(" "), [""]
    font = ImageFont.load_default(12)
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= image.width else [lines[-1], word]
    ImageDraw.Draw(image).text((2, SIDE + 2), "\n".join(lines), "black", font, spacing=2)
    return image


def sheet(parts: dict[str, list[Image.Image]]) -> Image.Image:
    """The cells of each part in a grid, as many in a row as fit, below its heading."""
    height, heading_height, top = SIDE + CAPTION + GAP, 24, 0
    columns = {heading: WIDTH // (cells[0].width + 2 * GAP) for heading, cells in parts.items()}
    rows = {heading: -(-len(cells) // columns[heading]) for heading, cells in parts.items()}
    image = Image.new("RGB", (WIDTH, sum(heading_height + count * height for count in rows.values())), "white")
    for heading, cells in parts.items():
        ImageDraw.Draw(image).text((GAP, top + 4), heading, "black", ImageFont.load_default(14))
        for i, each in enumerate(cells):
            row, column = divmod(i, columns[heading])
            image.paste(each, (column * (each.width + 2 * GAP) + GAP, top + heading_height + row * height))
        top += heading_height + rows[heading] * height
    return image


if __name__ == "__main__":
    main()
