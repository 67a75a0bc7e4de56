"""The options of int8, which the backends that compute in it share."""

from typing import Any

from turbochain.engines.backends.contract import Option, Options
from turbochain.runtime.bundle.quantization import PARTS

OPTIONS = {
    "int8": Option(
        "none",
        "which convolutions and linear layers are computed in int8: those of the VAE's decoder, or all of the UNet's "
        "too; faster, and with wider bounds (PSNR 30 dB, SSIM 0.9)",
        choices=tuple(PARTS),
    ),
    "int8_error": Option(
        4,
        "percent that int8 may change the result of the UNet or of the decoder, as measured for each of these layers: "
        "those beyond that are left as they are; less is tried if the bounds are missed",
        least=1,
        most=100,
    ),
}


def candidates(options: Options) -> list[dict[str, Any]]:
    """Return what int8 may cost, the most first; one candidate without choice if nothing is in int8."""
    most = options["int8_error"]
    if options["int8"] == "none":
        return [{}]
    return [{"int8_error": part} for part in range(most, 0, -max(1, most // 4))]
