"""The bounds that a result is held to, by precision and by what it is."""

Bounds = dict[str, float]

_EQUAL_PICTURE = {"max_abs": 1.0, "fraction_differing": 1e-3}

BOUNDS: dict[str, dict[str, Bounds]] = {
    "fp32": {
        "text": {"max_abs": 1e-3},
        "prediction": {"relative_l2": 1e-4},
        "decoder": _EQUAL_PICTURE,
        "image": _EQUAL_PICTURE,
    },
    "fp16": {
        "text": {"cosine": 0.9999},
        "prediction": {"relative_l2": 1e-2},
        "decoder": {"psnr": 45.0},
        "image": {"psnr": 38.0, "ssim": 0.98},
    },
    # 1.25 times what eager diffusers' bf16 errs by against its fp32, the worst over the miniatures of both families,
    # 3 prompts, steps 1, 2 and 4, random weights, torch 2.13 on a CPU: decoder 48.8 dB (full size at 512×512, with
    # the rounding of each module's result emulated: 49.0 dB), prediction 0.0147 (time embedding in fp32). Text
    # 0.99997 and picture 48.1 dB are better than what fp16 is allowed, which stands for both.
    "bf16": {
        "text": {"cosine": 0.9999},
        "prediction": {"relative_l2": 1.8e-2},
        "decoder": {"psnr": 46.8},
        "AutoencoderTiny": {"psnr": 43.3},  # by the same rule: 45.2 dB, full size, random weights, 512×512
        "image": {"psnr": 38.0, "ssim": 0.98},
    },
    # Only of a VAE and only on request: what a person sees when the two pictures take each other's place, and not
    # otherwise. Measured with the trained demo model at 512×512: decoder 35.3 to 46.6 dB.
    "int8": {
        "decoder": {"psnr": 30.0},
        "image": {"psnr": 30.0, "ssim": 0.9},
    },
}
"""Precision → kind of result, or class of a decoder with its own → metric → bound: an upper one, but for those in
`AT_LEAST`."""

AT_LEAST = ("cosine", "psnr", "ssim")

SCHEDULE_BOUND = 1e-4  # relative L2 of next_latents recomputed from diffusers' own prediction, in fp64

EMBEDDING_BOUND = 1e-5  # max abs of the timestep embedding, whose values are sines and cosines
