"""Record one call of a diffusers pipeline: what goes in and out of its parts, under the names that a chain has for it.

Nothing here computes a picture: the pipeline runs as any user would run it, and hooks write down what they see.
"""

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from turbochain.export import recording_controls as controls
from turbochain.export.controls.kind import Control
from turbochain.export.families import Family, common
from turbochain.export.recorded_calls import WHOLE, Call, Extent
from turbochain.export.sampler import Draw, drawing
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import time
from turbochain.runtime.bundle.manifest import Chain
from turbochain.runtime.errors import PictureError
from turbochain.runtime.inputs.embeds import NEGATIVE
from turbochain.runtime.inputs.guidance import GUIDANCE, NEGATIVE_PROMPT

NEGATIVE_TEXT = "low quality, blurry"
"""The negative prompt of a call in that mode."""


def sample_image(height: int, width: int, seed: int) -> np.ndarray:
    """Return a picture [H, W, 3] uint8 with areas and edges, the same on every machine."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    rng = np.random.RandomState(seed)
    waves = np.stack([np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(-2, 2, (3, 3))], axis=-1)
    waves[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05] *= -1
    return np.clip(127.5 + 120 * waves, 0, 255).round().astype(np.uint8)


def sample_mask(height: int, width: int) -> np.ndarray:
    """Return a mask [H, W] uint8 that repaints (white) the right half and the upper left corner."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :], mask[: height // 3, : width // 4] = 255, 255
    return mask


def record_call(
    pipeline: Any,
    checkpoint: Checkpoint,
    chain: Chain,
    call: Call,
    more: Mapping[str, Any] = MappingProxyType({}),
    control: Control | None = None,
    extent: Extent = WHOLE,
) -> dict[str, np.ndarray]:
    """Run the pipeline once, with the arguments `more`; return what its parts read and made, by the chain's names.

    `control`: what steers the UNet in this call. `extent`: how much of that is returned.
    Raises PictureError if diffusers makes no picture of this checkpoint.
    """
    guided = GUIDANCE in call.modes
    once: dict[str, Any] = {"guidance_scale": torch.tensor([call.guidance_scale])} if guided else {}
    steps: list[dict[str, torch.Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name, folder in checkpoint.family.tokenizers.items():
            encoder = getattr(pipeline, folder.replace("tokenizer", "text_encoder"))
            _hook(stack, encoder, partial(_keep_ids, once, name))
        _hook(stack, pipeline.unet, partial(_keep_prediction, checkpoint, once, steps, guided))
        family = checkpoint.family
        watched = [name for name in (*family.columns, *family.slot_columns) if name in chain.feeds]
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in watched}
        for name, of_column in columns.items():
            time.watch(stack, pipeline.unet, name, of_column.append)
        stack.enter_context(_watch_steps(pipeline, steps, guided))
        if call.strength is not None:
            stack.enter_context(_watch_start(pipeline, once))
        rows: list[dict[str, torch.Tensor]] = []
        of_control = None if control is None else controls.feed(checkpoint.family, checkpoint.configs, control)
        if control is not None:
            rows = controls.watch(stack, _hook, pipeline, checkpoint.family, control, guided, once, extent.rows)
        image = draw(pipeline, chain, call, {**more, **_watched_latents(chain, steps)}, of_control)
    if not all(torch.isfinite(step["next_latents"]).all() for step in steps) or image.min() == image.max():
        raise PictureError(
            "diffusers' own fp32 picture of this checkpoint is NaN or of one single value, so there is nothing to "
            "check against; the weights are damaged"
        )
    stacked = {key: torch.stack([step[key] for step in steps[: extent.rows]]) for key in steps[0]}
    left = _left(chain)
    if len(stacked[left]) < len(steps):
        stacked[left] = torch.stack([*stacked[left], steps[-1][left]])
    stacked |= {name: torch.stack([row[name] for row in rows if name in row]) for name in (rows or [{}])[0]}
    stacked |= {name: torch.stack(of_column) for name, of_column in columns.items()}
    arrays = {k: np.ascontiguousarray(v.numpy()) for k, v in {**once, **stacked}.items()}
    found = {k: v.astype(np.int32) if "input_ids" in k else v for k, v in arrays.items()}
    found |= _pictures(chain, call, of_control)[1] | {"image": image}
    found = controls.sampled(found) if extent.sampled else found
    return as_stream(found, checkpoint.family) if chain.stream else found


def as_stream(found: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """Return a call of one picture as a stream makes it if every frame is that picture, with that seed.

    The frames under way then have what the call had in its later rows, and a launch makes all of its rows.
    """
    rows = [*family.columns, "latents", "prediction", "noise"]
    batch = {name: np.concatenate(found[name])[None] for name in rows}
    left = np.concatenate(found["next_latents"])
    together = {common.ALL + "latents": batch.pop("latents")}
    held = {"latents": together[common.ALL + "latents"][0, 1:]}
    for name in common.embeds(family):
        held[name] = np.repeat(found[name], len(left) - 1, axis=0)
        together |= {common.ALL + name: np.concatenate([found[name], held[name]])[None]}
    kept = {f"next_{common.STREAM}{name}": value[None] for name, value in {**held, "latents": left[:-1]}.items()}
    entering = {"latents": found["latents"][:1], "next_latents": left[None, -1:]}
    return {**found, **batch, **together, **kept, **entering, **{common.STREAM + n: v for n, v in held.items()}}


def draw(
    pipeline: Any,
    chain: Chain,
    call: Call,
    more: Mapping[str, Any] = MappingProxyType({}),
    of_control: str | None = None,
) -> np.ndarray:
    """Return the pictures of a call [B, H, W, 3] uint8; `more`: further arguments of the pipeline, `of_control`: the
    feed of the control image."""
    arguments, _ = _pictures(chain, call, of_control)
    if NEGATIVE_PROMPT in call.modes:
        arguments["negative_prompt"] = [NEGATIVE_TEXT] * len(call.prompt)
    result = pipeline(
        prompt=call.prompt,
        num_inference_steps=call.num_inference_steps,
        guidance_scale=call.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(call.seed),
        **arguments,
        **more,
    )
    return np.stack([np.asarray(picture) for picture in result.images])


def _pictures(chain: Chain, call: Call, of_control: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the arguments of size and pictures that the pipeline takes, and what the chain is fed instead."""
    height, width = chain.size
    if of_control is not None:
        own, fed = _pictures(chain, call, None)
        pictures = np.stack([sample_image(height, width, call.seed + 500 + row) for row in range(chain.batch)])
        pictures = pictures[..., :1] if of_control.startswith("grey") else pictures
        argument = "image" if call.strength is None else "control_image"
        given = [Image.fromarray(picture.squeeze()) for picture in pictures]
        return {**own, argument: given}, {**fed, of_control: pictures}
    size = {"height": height, "width": width}
    if call.strength is None:
        return size, {}
    images = np.stack([sample_image(height, width, call.seed + row) for row in range(chain.batch)])
    arguments: dict[str, Any] = {"image": [Image.fromarray(i) for i in images], "strength": call.strength}
    if "mask" not in chain.feeds:
        return arguments, {"input_image": images}
    mask = Image.fromarray(sample_mask(height, width))
    return arguments | size | {"mask_image": mask}, {"input_image": images}


def _keep_ids(once: dict[str, Any], name: str, call: dict[str, Any], output: Any) -> None:
    """Keep what a text encoder read: the prompt's ids first, then those of the negative prompt."""
    once[NEGATIVE + name if name in once else name] = call["input_ids"]


def _keep_prediction(
    checkpoint: Checkpoint,
    once: dict[str, Any],
    steps: list[dict[str, torch.Tensor]],
    guided: bool,
    call: dict[str, Any],
    output: Any,
) -> None:
    """Keep what the UNet read of the prompts and what it predicted; with guidance the negative ones stand first."""
    read, predicted = checkpoint.family.embeds(checkpoint.configs, call), output[0]
    if not guided:
        once |= read
        steps.append({"prediction": predicted})
        return
    for name, value in read.items():
        once[NEGATIVE + name], once[name] = value.chunk(2)
    negative, positive = predicted.chunk(2)
    steps.append({"prediction": positive, f"{NEGATIVE}prediction": negative})


def _hook(stack: contextlib.ExitStack, module: torch.nn.Module, see: Callable[[dict[str, Any], Any], object]) -> None:
    """Call `see(arguments, output)` after every forward of `module`; arguments by name."""
    names = list(inspect.signature(module.forward).parameters)

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see({**dict(zip(names, args, strict=False)), **kwargs}, output)

    handle = module.register_forward_hook(after, with_kwargs=True)
    stack.callback(handle.remove)


@contextlib.contextmanager
def _watch_steps(pipeline: Any, steps: list[dict[str, torch.Tensor]], guided: bool) -> Iterator[None]:
    """Add to the last entry of `steps` what `scheduler.step` read and returned, and the noise that it drew or zeros.

    The pipeline runs with a copy, because DPMSolverSinglestepScheduler keeps a change of its config for the next call.
    """
    kept = pipeline.scheduler
    scheduler = pipeline.scheduler = copy.deepcopy(kept)
    original = scheduler.step

    @functools.wraps(original)  # diffusers reads the parameters of `step` to see whether it takes a generator or eta
    def step(prediction: torch.Tensor, t: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        drawn = torch.zeros_like(sample)

        def watched(draw: Draw) -> Draw:
            return lambda *args, **options: drawn.copy_(draw(*args, **options)).clone()

        before = sample.clone()
        with drawing(scheduler, watched):
            result = original(prediction, t, sample, **kwargs)
        steps[-1] |= {"latents": before, "noise": drawn, "next_latents": result[0].clone()}
        if guided:
            steps[-1]["guided_prediction"] = prediction.clone()
        return result

    scheduler.step = step
    try:
        yield
    finally:
        pipeline.scheduler = kept


@contextlib.contextmanager
def _watch_start(pipeline: Any, once: dict[str, Any]) -> Iterator[None]:
    """Keep the posterior's noise, the image's latents, the noise that is added to them, and the mask."""
    prepare: Any = pipeline.prepare_latents
    prepare_mask: Any = getattr(pipeline, "prepare_mask_latents", None)
    vae_module = sys.modules["diffusers.models.autoencoders.vae"]
    draw = vae_module.randn_tensor
    drawn: list[torch.Tensor] = []

    def watched_draw(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(draw(*args, **options))
        return drawn[-1]

    def watched_prepare(*args: Any, **options: Any) -> Any:
        with _watch_noise(pipeline, once):
            made = prepare(*args, **options)
        if isinstance(made, tuple) and len(made) == 3:  # of inpainting: at full strength no noise is added
            once["start_noise"], once["image_latents"] = made[1].clone(), made[2].clone()
        if drawn:
            once["posterior_noise"] = torch.cat(drawn)
        return made

    def watched_mask(*args: Any, **options: Any) -> Any:
        made = prepare_mask(*args, **options)
        once["mask"] = made[0][: len(once["image_latents"])].clone()
        return made

    with contextlib.ExitStack() as stack:
        put(stack, vae_module, "randn_tensor", watched_draw)
        put(stack, pipeline, "prepare_latents", watched_prepare)
        if prepare_mask is not None:
            put(stack, pipeline, "prepare_mask_latents", watched_mask)
        yield


@contextlib.contextmanager
def _watch_noise(pipeline: Any, once: dict[str, Any]) -> Iterator[None]:
    """Keep what `scheduler.add_noise` reads."""
    add_noise = pipeline.scheduler.add_noise

    def watched(image: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        once["image_latents"], once["start_noise"] = image.clone(), noise.clone()
        return add_noise(image, noise, timesteps)

    with contextlib.ExitStack() as stack:
        put(stack, pipeline.scheduler, "add_noise", watched)
        yield


def put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until `stack` is closed."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))


def _watched_latents(chain: Chain, steps: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the arguments with which a pipeline tells the latents that each step leaves, if they are not the
    sampler's."""
    left = _left(chain)
    if left == "next_latents":
        return {}

    def keep(_: Any, row: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps[row][left] = values["latents"].clone()
        return {}

    return {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["latents"]}


def _left(chain: Chain) -> str:
    """Return the name of the latents that a row leaves for the next one."""
    return next(made for made, read in chain.carry.items() if read == "latents")
