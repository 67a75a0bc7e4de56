"""Step: a kernel that writes outside of its array. From then on every call must say that the process has to restart."""

from collections.abc import Callable
from pathlib import Path

import torch

from torch_stages import OnGpu, Place
from turbochain.runtime.errors import CudaFault

from .chains import draw
from .miniatures import miniature
from .results import Report


def write_outside() -> None:
    """Let a kernel of PyTorch's write where it must not; CUDA refuses this process from now on."""
    try:
        torch.zeros(4, device="cuda")[torch.tensor([10**9], device="cuda")] = 1
        torch.cuda.synchronize()
    except RuntimeError:  # as it must be
        return
    raise AssertionError("the kernel did not fail")


def run(
    report: Report,
    prepared: Path,
    place: Callable[[], Place] = OnGpu,
    cause: Callable[[], None] = write_outside,
) -> None:
    """Report what three calls after the fault say, and whether the pipeline closes."""
    with miniature(prepared, place, "sd", "fp32").loaded() as pipe:
        draw(pipe)
        report.attempt("cause", cause)
        for i in range(3):
            report.add(f"call {i + 1} after it", _said(lambda: draw(pipe)))
    report.add("closed", True)


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except CudaFault as error:
        return f"CudaFault: {error}"
    except Exception as error:
        return f"not a CudaFault, but {type(error).__name__}: {error}"
    return "no error"
