"""Every exception that turbochain raises on purpose.

A message is one sentence or two: what is wrong, what was expected, and the command that mends it. The
command line prints it without a traceback and exits with `exit_status`.
"""


class TurbochainError(Exception):
    """Base class: something failed although the input was sound (exit status 1)."""

    exit_status = 1


class InputError(TurbochainError, ValueError):
    """The caller asked for something that cannot be done: a bad argument, source or path (exit status 2)."""

    exit_status = 2


class BundleError(InputError):
    """The bundle is damaged, tampered with, contradictory, or of a format this version cannot read."""


class NoSpace(InputError):
    """The disk is full. What was finished is kept: after making room, the same command goes on."""


class PhaseDied(TurbochainError):
    """A process of a build was killed, or crashed. What was finished is kept: the same command goes on."""


class BackendMissing(InputError):
    """The backend's package is not installed; the message holds the `pip install` line that mends it."""


class NoGpu(InputError):
    """There is no usable NVIDIA GPU: no driver, one that is too old, no device, or not the one asked for."""


class OutOfMemory(TurbochainError):
    """The GPU's memory does not suffice; what was taken has been given back, and the process goes on."""


class CudaError(TurbochainError):
    """A CUDA call failed; the process can go on using the GPU."""


class CudaFault(TurbochainError):
    """An error after which CUDA refuses every call of this process: it must be restarted."""


class Cancelled(TurbochainError):
    """The caller's `cancel` ended the call early; the pipeline is as before it."""


class VerificationError(TurbochainError):
    """A result differs from what diffusers produced by more than its bound."""


class PictureError(TurbochainError):
    """The chain produced something that is no picture: NaN or infinite latents, or one single value."""
