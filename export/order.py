"""What an export is asked for, checked in one place for the command line and for Python."""

from collections.abc import Collection
from dataclasses import dataclass

from turbochain.runtime.errors import InputError

PRECISIONS = ("fp32", "fp16")
VAE_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class ExportOrder:
    """What bundle to make; InputError lists every value that cannot be. None: the default."""

    source: str  # a hub id, a folder in diffusers' format, "demo", "synthetic:NAME"
    precision: str | None = None  # fp32 or fp16
    vae_precision: str | None = None  # fp32 or bf16, for the VAE instead
    vae: str | None = None  # "tiny", a hub id or a folder: this VAE instead of the checkpoint's own
    size: tuple[int, int] | None = None  # width, height in pixels, multiples of 64
    batch: int | None = None  # pictures per pass
    steps: Collection[int] | None = None  # step counts, 1 to 50
    opset: int | None = None  # of the ONNX graphs, 18 to 23
    revision: str | None = None  # branch, tag or commit of a hub id
    variant: str | None = None  # of the weight files, such as "fp16"

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in (None, *PRECISIONS):
            problems.append(f"precision {self.precision!r}: choose {' or '.join(PRECISIONS)}")
        if self.vae_precision not in (None, *VAE_PRECISIONS):
            problems.append(f"precision {self.vae_precision!r} of the VAE: choose {' or '.join(VAE_PRECISIONS)}")
        if self.size is not None and (min(self.size) < 64 or any(side % 64 for side in self.size)):
            width, height = self.size
            problems.append(f"size {width}x{height}: width and height must be multiples of 64 pixels")
        if self.batch is not None and self.batch < 1:
            problems.append(f"batch {self.batch}: at least 1 was expected")
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or max(self.steps) > 50):
            problems.append(f"steps {list(self.steps)}: counts from 1 to 50 were expected, such as 1-4 or 1,2,4")
        if self.opset is not None and not 18 <= self.opset <= 23:
            problems.append(f"opset {self.opset}: 18 to 23 was expected")
        if problems:
            raise InputError("; ".join(problems))
