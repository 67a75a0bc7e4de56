"""The option of int8, which the backends that compute in it share."""

from typing import Any

from turbochain.engines.backends.contract import Option, Options
from turbochain.runtime.bundle.quantization import PARTS

ERRORS = (4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25)
"""The error budgets, in percent (relative L2): how much int8 may add to a decoder's picture or to a UNet's latents, as
summed from the error measured for each layer. They are tried in this order until the recorded pictures are within their
bounds. From one to the next a picture gains about 3 dB."""


OPTIONS = {
    "int8": Option(
        "none",
        "which convolutions and linear layers are computed in int8: those of the VAE's decoder, or all of the UNet's "
        "too; faster, and with pictures that are further from diffusers' (PSNR 30 dB, SSIM 0.9)",
        choices=tuple(PARTS),
    ),
}


def candidates(options: Options) -> list[dict[str, Any]]:
    """Return what int8 may add, the most first; one candidate without choice if nothing is in int8."""
    return [{}] if options["int8"] == "none" else [{"int8_error": error} for error in ERRORS]
