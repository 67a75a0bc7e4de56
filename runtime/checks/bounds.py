"""The bounds of every kind of result, by precision."""

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from turbochain.runtime.inputs.guidance import GUIDANCE

Bounds = dict[str, float]

_EQUAL_PICTURE = {"max_abs": 1.0, "fraction_differing": 1e-3}

BOUNDS: dict[str, dict[str, Bounds]] = {
    "fp32": {
        "text": {"max_abs": 1e-3},
        "image_latents": {"relative_l2": 1e-4},
        "residuals": {"relative_l2": 1e-4},
        "prediction": {"relative_l2": 1e-4},
        "picture": _EQUAL_PICTURE,
        "image": _EQUAL_PICTURE,
    },
    "fp16": {
        "text": {"cosine": 0.9999},
        "image_latents": {"relative_l2": 1e-2},
        "residuals": {"relative_l2": 1e-2},
        "prediction": {"relative_l2": 1e-2},
        "picture": {"psnr": 45.0},
        "image": {"psnr": 38.0, "ssim": 0.98},
    },
    # 1.25 times the error of eager diffusers' bf16 against its fp32, the worst over the miniatures of both families,
    # 3 prompts, steps 1, 2 and 4, random weights, torch 2.13 on a CPU: decoder 48.8 dB (full size at 512×512, with
    # the rounding of each module's result emulated: 49.0 dB), prediction 0.0147 (time embedding in fp32). Text
    # 0.99997 and picture 48.1 dB are better than what fp16 is allowed, which stands for both.
    "bf16": {
        "text": {"cosine": 0.9999},
        "image_latents": {"relative_l2": 1.8e-2},
        "residuals": {"relative_l2": 1.8e-2},
        "prediction": {"relative_l2": 1.8e-2},
        "picture": {"psnr": 46.8},
        "AutoencoderTiny": {"psnr": 43.3},  # by the same rule: 45.2 dB, full size, random weights, 512×512
        "image": {"psnr": 38.0, "ssim": 0.98},
    },
    # Only on request: a person sees a difference if one picture is swapped for the other, and not otherwise. Measured
    # with the trained demo model's VAE at 512×512: decoder 35.3 to 46.6 dB. The picture decides about a prediction.
    "int8": {
        "prediction": {"relative_l2": 0.1},
        "picture": {"psnr": 30.0},
        "image": {"psnr": 30.0, "ssim": 0.9},
    },
}
"""Precision → what a stage makes (`JUDGED` in the manifest), the class of a model that has a bound of its own, or
"image", the whole chain's → metric → bound: a lower one for those in `AT_LEAST`, else an upper one."""

AT_LEAST = ("cosine", "psnr", "ssim")
"""The metrics of which more is better."""

STATE: Bounds = {"relative_l2": 1e-4}
"""The sampler's arithmetic, which is computed in fp32 in every precision."""

COLUMN: Bounds = {"relative_l2": 1e-5}
"""A column of the table that depends on the timestep, against what diffusers' UNet made of the timestep."""


IDS: Bounds = {"fraction_differing": 0.0}
"""The token ids of a prompt, against those that diffusers' pipeline fed its text encoder."""


FEW_EVALUATIONS = 4
"""Up to this many evaluations of the network, without guidance, a whole chain's picture has the bounds in `BOUNDS`."""

_FACTOR = 1.25
"""The error of a picture after more evaluations, or of a prediction, at most, as a multiple of diffusers' own in that
precision."""


def has_many(evaluations: int, modes: Collection[str]) -> bool:
    """Return whether a call's picture is compared by diffusers' own error in that precision."""
    return evaluations > FEW_EVALUATIONS or GUIDANCE in modes


def of_image(precision: str, errors: Mapping[str, Bounds]) -> Bounds:
    """Return the bounds of a whole chain's picture, whose least precise stage is computed in `precision`.

    `errors`: precision → metric → diffusers' own against its fp32, of a call with many evaluations. 1.25 times that is
    the bound, unless a picture of few evaluations may have a larger error: two runs of diffusers in bf16 that round in
    other places are up to 1.7 dB apart, so that the smallest errors are no measure.
    """
    fixed = BOUNDS[precision]["image"]
    own = errors.get("bf16" if precision == "int8" else precision)
    if not own or "psnr" not in own or precision == "fp32":
        return fixed
    found = {"psnr": own["psnr"] - 20 * math.log10(_FACTOR), "ssim": 1 - _FACTOR * (1 - own["ssim"])}
    return {name: min(fixed[name], value) for name, value in found.items()}


def of_stage(precision: str, judged: str, model_class: str, own: Mapping[str, float] = MappingProxyType({})) -> Bounds:
    """Return the bounds of what a stage makes, computed in `precision` by a model of this class.

    `own`: precision → the relative L2 of diffusers' own predictions against its fp32; 1.25 times that is allowed too.
    Deep UNets have more of it: SDXL with random weights at full size, in bf16 with torch on a CPU, 0.037.
    """
    if judged == "state":
        return STATE
    found = BOUNDS[precision]
    if judged == "prediction" and precision != "fp32":
        return {"relative_l2": max(found[judged]["relative_l2"], _FACTOR * own.get(precision, 0.0))}
    return found.get(model_class, found[judged])


def own_of_predictions(errors: Iterable[Mapping[str, Bounds]]) -> Bounds:
    """Return precision → the largest relative L2 of a prediction among the recorded cases' errors."""
    found: Bounds = {}
    for of_case in errors:
        for precision, own in of_case.items():
            found[precision] = max(found.get(precision, 0.0), own.get("relative_l2", 0.0))
    return found
