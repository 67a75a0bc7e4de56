"""The tiny graphs of `small_bundle`, as ONNX text."""

import numpy as np

T2I, I2I = "text-to-image", "image-to-image"
BATCH, CHANNELS, LENGTH = 2, 4, 6
SIZES = {T2I: (16, 16), I2I: (8, 24)}
LATENTS = {name: (BATCH, CHANNELS, height // 8, width // 8) for name, (height, width) in SIZES.items()}
WORDS = (".", "?", "a", "red", "cat", "dog", "in", "the", "snow")
NUMBERS = np.random.default_rng(17)
WEIGHTS = {
    "table": NUMBERS.standard_normal((len(WORDS), CHANNELS), np.float32),
    "positions": NUMBERS.standard_normal((LENGTH, CHANNELS), np.float32),
    "decode": NUMBERS.standard_normal((CHANNELS, 3), np.float32),
    "encode": NUMBERS.standard_normal((3, CHANNELS), np.float32),
    "control": NUMBERS.standard_normal((3, CHANNELS), np.float32),
}


def _shape(*sizes: int) -> str:
    return "[" + ",".join(map(str, sizes)) + "]"


def weights(*names: str) -> str:
    """Return initializers of these names."""
    return ", ".join(
        f"float{_shape(*WEIGHTS[n].shape)} {n} = {{{', '.join(repr(float(v)) for v in WEIGHTS[n].flat)}}}"
        for n in names
    )


EMBEDS = f"float{_shape(BATCH, LENGTH, CHANNELS)}"
TEXT_ENCODER = f"""
text_encoder (int32{_shape(BATCH, LENGTH)} input_ids) => ({EMBEDS} prompt_embeds) <{weights("table", "positions")}> {{
    gathered = Gather (table, input_ids)
    prompt_embeds = Add (gathered, positions)
}}"""


def _unet(latents: str, ends: str, results: str, more: str) -> str:
    return f"""
unet (float{latents} latents, float[1] input_scale, float[1,{CHANNELS},1,1] time, float[1] extent,
      {EMBEDS} prompt_embeds{ends}) => ({results}) <int64[1] tokens = {{1}}, int64[2] places = {{2, 3}}> {{
    scaled = Mul (latents, input_scale)
    text = ReduceSum <keepdims = 0> (prompt_embeds, tokens)
    small = Constant <value_float = 0.05> ()
    gain = Mul (text, small)
    wide = Unsqueeze (gain, places)
    product = Mul (scaled, wide)
    timed = Add (product, time)
    {more}
}}"""


def _step(latents: str, ends: str, results: str, more: str, predicted: str) -> str:
    return f"""
step (float{latents} latents, float{latents} prediction{ends}, float{latents} noise, float[1,1] m, float[1] v,
      float[1] w) => (float{latents} next_latents{results}) {{
    {more}
    kept = Mul (latents, m)
    moved = Mul ({predicted}, v)
    drawn = Mul (noise, w)
    sum = Add (kept, moved)
    next_latents = Add (sum, drawn)
}}"""


def _multistep(latents: str, K: int) -> str:
    history = f"float[{K - 1},{latents[1:]}"
    return f"""
step (float{latents} latents, float{latents} prediction, float{latents} noise, float[{K},{K}] m, float[{K}] v,
      float[{K}] w, {history} history) => (float{latents} next_latents, {history} next_history)
<int64[1] first = {{0}}, int64[2] flat = {{{K}, -1}}, int64[2] one = {{1, -1}}, int64[2] column = {{{K}, 1}},
 int64[5] whole = {{{K}, {latents[1:-1]}}}, int64[2] sizes = {{1, {K - 1}}}> {{
    now = Unsqueeze (latents, first)
    state = Concat <axis = 0> (now, history)
    rows = Reshape (state, flat)
    kept = MatMul (m, rows)
    predicted = Reshape (prediction, one)
    by = Reshape (v, column)
    moved = Mul (by, predicted)
    unit = Reshape (noise, one)
    with = Reshape (w, column)
    drawn = Mul (with, unit)
    sum = Add (kept, moved)
    all = Add (sum, drawn)
    made = Reshape (all, whole)
    next, next_history = Split <axis = 0> (made, sizes)
    next_latents = Squeeze (next, first)
}}"""


def _decoder(chain: str) -> str:
    (_, _, h, w), (height, width) = LATENTS[chain], SIZES[chain]
    return f"""
vae_decoder (float{_shape(*LATENTS[chain])} next_latents) => (uint8[{BATCH},{height},{width},3] image)
<{weights("decode")}, int64[6] apart = {{{BATCH}, {h}, 1, {w}, 1, 3}}, int64[6] large = {{{BATCH}, {h}, 8, {w}, 8, 3}},
 int64[4] whole = {{{BATCH}, {height}, {width}, 3}}> {{
    last = Transpose <perm = [0, 2, 3, 1]> (next_latents)
    colours = MatMul (last, decode)
    contrast = Constant <value_float = 40.0> ()
    grey = Constant <value_float = 128.0> ()
    black = Constant <value_float = 0.0> ()
    white = Constant <value_float = 255.0> ()
    levels = Mul (colours, contrast)
    shifted = Add (levels, grey)
    clipped = Clip (shifted, black, white)
    rounded = Round (clipped)
    points = Reshape (rounded, apart)
    blocks = Expand (points, large)
    pixels = Reshape (blocks, whole)
    image = Cast <to = 2> (pixels)
}}"""


def _encoder(name: str, picture: str, weight: str, ends: str, result: str, more: str) -> str:
    (_, _, h, w), (height, width) = LATENTS[I2I], SIZES[I2I]
    return f"""
{name} (uint8[{BATCH},{height},{width},3] {picture}{ends}) => (float{_shape(*LATENTS[I2I])} {result})
<{weights(weight)}, int64[6] blocks = {{{BATCH}, {h}, 8, {w}, 8, 3}}, int64[2] inside = {{2, 4}}> {{
    values = Cast <to = 1> ({picture})
    split = Reshape (values, blocks)
    points = ReduceMean <keepdims = 0> (split, inside)
    white = Constant <value_float = 255.0> ()
    unit = Div (points, white)
    mixed = MatMul (unit, {weight})
    first = Transpose <perm = [0, 3, 1, 2]> (mixed)
    {more}
}}"""


def graphs() -> dict[str, tuple[str, str]]:
    """Return graph → its role and its text."""
    text, image = (_shape(*LATENTS[name]) for name in (T2I, I2I))
    guided = f", float{text} negative_prediction, float[1] guidance_scale"
    guide = """apart = Sub (prediction, negative_prediction)
    more = Mul (apart, guidance_scale)
    guided_prediction = Add (negative_prediction, more)"""
    stream = f", float{image} stream, float{image} residual, float[1] conditioning_scale"
    unet_of_stream = """own = Mul (timed, extent)
    half = Constant <value_float = 0.5> ()
    quarter = Constant <value_float = 0.25> ()
    past = Mul (stream, half)
    steered = Mul (residual, conditioning_scale)
    with_past = Add (own, past)
    prediction = Add (with_past, steered)
    next_stream = Mul (prediction, quarter)"""
    blur = """tenth = Constant <value_float = 0.1> ()
    spread = Mul (posterior_noise, tenth)
    image_latents = Add (first, spread)"""
    posterior = f", float{image} posterior_noise"
    start = f"""
start (float{image} image_latents, float{image} start_noise, float[1] p, float[1] q) => (float{image} latents) {{
    known = Mul (image_latents, p)
    unknown = Mul (start_noise, q)
    latents = Add (known, unknown)
}}"""
    result = f"float{image} prediction, float{image} next_stream"
    return {
        "text_encoder": ("text_encoder", TEXT_ENCODER),
        "unet": ("unet", _unet(text, "", f"float{text} prediction", "prediction = Mul (timed, extent)")),
        "step": ("step", _step(text, "", "", "", "prediction")),
        "step+guidance": (
            "step",
            _step(text, guided, f", float{text} guided_prediction", guide, "guided_prediction"),
        ),
        "vae_decoder": ("vae_decoder", _decoder(T2I)),
        "vae_encoder": (
            "vae_encoder",
            _encoder("vae_encoder", "input_image", "encode", posterior, "image_latents", blur),
        ),
        "start": ("start", start),
        "controlnet": (
            "controlnet",
            _encoder("controlnet", "control_image", "control", "", "residual", "residual = Identity (first)"),
        ),
        "unet@24x8": ("unet", _unet(image, stream, result, unet_of_stream)),
        "step@24x8": ("step", _multistep(image, 3)),
        "vae_decoder@24x8": ("vae_decoder", _decoder(I2I)),
    }
