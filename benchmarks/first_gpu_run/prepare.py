"""Write what a run needs and cannot make: miniature bundles with diffusers' own pictures, tokenizers and configs."""

import contextlib
import tempfile
from pathlib import Path

from turbochain.export import export
from turbochain.export.sources import synthetic
from turbochain.runtime import Bundle

from . import hollow
from .onnxruntime import BUNDLE

MINIATURES = {"sd": ("sd-turbo-mini", 1), "sdxl": ("sdxl-turbo-mini", 2)}
"""Family → the preset of its miniature, and the pictures per pass."""
FULL = ("sd-turbo", "sdxl-turbo")
SIZE = (64, 64)


class _Enough(Exception):
    """A checkpoint is written but for its weights."""


def write(folder: Path) -> None:
    """Write `folder`: bundles and full-size checkpoints without weights, and one bundle with them for ONNX Runtime."""
    with tempfile.TemporaryDirectory() as kept:
        for family, (preset, batch) in MINIATURES.items():
            made = export(f"synthetic:{preset}", Path(kept, f"{preset}.bundle"), size=SIZE, batch=batch)
            hollow.of_bundle(Bundle.open(made), folder / f"{family}.bundle")
    export(f"synthetic:{MINIATURES['sd'][0]}", folder / BUNDLE, precision="fp16", size=SIZE)
    for preset in FULL:
        write_small(preset, folder / preset)


def write_small(preset: str, folder: Path) -> None:
    """Write all of a synthetic checkpoint but its weights: configs, tokenizers and the scheduler."""

    def stop(*_: object) -> None:
        raise _Enough

    with contextlib.suppress(_Enough):
        synthetic.write_checkpoint(preset, folder, before_weights=stop)
