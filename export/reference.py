"""Record what diffusers' own pipeline produces, in fp32: every engine is checked against it.

Nothing here computes a picture: the pipeline runs as any user would run it, and hooks write down what goes
in and out of its parts.
"""

import contextlib
import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from turbochain.export import inversion
from turbochain.export.families import Shape
from turbochain.export.sampler import Draw, drawing
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.export.tracing import time
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.errors import PictureError

PROMPTS = (
    "a photo of a cat wearing a red hat, studio light",
    "a lighthouse on a cliff at dusk, oil painting",
    "une petite maison bleue près d'un lac, 水彩画",
    "",
)
"""One case per step count; the rows of a batch go on through the list. Added tokens have cases of their own."""


def write(
    pipeline: Any,
    checkpoint: Checkpoint,
    shape: Shape,
    steps: list[int],
    path: Path,
    progress: Callable[[int, int], None],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Run one case per step count, and with the fewest steps as many as use every added token; write `path`.

    It is safetensors: everything fp32, ids int32, pictures uint8.

    Tensors of case i, with R evaluations: `i/<feed of ids>` [B, 77], `i/<embeds>`, `i/latents`, `i/noise`,
    `i/prediction`, `i/next_latents` [R, B, 4, h, w], `i/<column of the time>` [R, 1, n], `i/image` [B, H, W, 3];
    `magnitude/<component>/<module>` [1] is the largest absolute value that the module put out in any case, and
    `magnitude/<component>/<attention>.scores` that of Q·Kᵀ as its graph forms it (see `_watch_scores`). The metadata
    key `cases` is JSON: a list of {"chain": str, "modes": [...], "prompt": [...], "seed": int, "num_inference_steps":
    int}. `pipeline`: diffusers' own, in fp32. `more`: further arguments of each call, such as `timesteps`.
    """
    pipeline.set_progress_bar_config(disable=True)

    def rows(prompts: Sequence[str], start: int) -> list[str]:
        return [prompts[(start + row) % len(prompts)] for row in range(shape.batch)]

    tokenizers = [getattr(pipeline, folder) for folder in checkpoint.family.tokenizers.values()]
    of_tokens = inversion.prompts(pipeline, tokenizers)
    calls = [(count, rows(PROMPTS, i)) for i, count in enumerate(steps)]
    calls += [(min(steps), rows(of_tokens, start)) for start in range(0, len(of_tokens), shape.batch)]
    cases = [
        {"chain": TEXT_TO_IMAGE, "modes": [], "prompt": prompt, "seed": 1000 + i, "num_inference_steps": count}
        for i, (count, prompt) in enumerate(calls)
    ]
    tensors: dict[str, np.ndarray] = {}
    done, total = 0, sum(count + 1 for count, _ in calls)  # a few more evaluations than steps for some schedulers

    def advance(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    with contextlib.ExitStack() as stack, torch.inference_mode():
        magnitudes = stack.enter_context(_magnitudes(pipeline, checkpoint))
        pipeline.unet.register_forward_hook(advance)
        for i, case in enumerate(cases):
            for name, value in run_case(pipeline, checkpoint, shape, case, more).items():
                tensors[f"{i}/{name}"] = value
            advance()
    tensors |= {f"magnitude/{name}": np.array([largest], np.float32) for name, largest in magnitudes.items()}
    path.write_bytes(save(tensors, metadata={"cases": json.dumps(cases)}))


def run_case(
    pipeline: Any,
    checkpoint: Checkpoint,
    shape: Shape,
    case: dict[str, Any],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Run the pipeline once, with the arguments `more`; return what its parts read and made, by name (see `record`)."""
    once: dict[str, Any] = {}
    steps: list[dict[str, torch.Tensor]] = []
    with contextlib.ExitStack() as stack:
        for name, folder in checkpoint.family.tokenizers.items():
            encoder = getattr(pipeline, folder.replace("tokenizer", "text_encoder"))
            _hook(stack, encoder, partial(_keep_ids, once, name))
        embeds = checkpoint.family.embeds
        _hook(stack, pipeline.unet, lambda call, out: once.update(embeds(checkpoint.configs, call)))
        _hook(stack, pipeline.unet, lambda call, out: steps.append({"prediction": out[0]}))
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in checkpoint.family.columns}
        for name, rows in columns.items():
            time.watch(stack, pipeline.unet, name, rows.append)
        stack.enter_context(_watch_steps(pipeline, steps))
        result = pipeline(
            prompt=case["prompt"],
            num_inference_steps=case["num_inference_steps"],
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(case["seed"]),
            height=shape.height,
            width=shape.width,
            **more,
        )
    image = np.stack([np.asarray(picture) for picture in result.images])
    if not all(torch.isfinite(step["next_latents"]).all() for step in steps) or image.min() == image.max():
        raise PictureError(
            "diffusers' own fp32 picture of this checkpoint is NaN or of one single value, so there is nothing to "
            "check against; the weights are damaged"
        )
    stacked = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}
    stacked |= {name: torch.stack(rows) for name, rows in columns.items()}
    arrays = {k: np.ascontiguousarray(v.numpy()) for k, v in {**once, **stacked}.items()}
    return {
        **{k: v.astype(np.int32) if k in checkpoint.family.tokenizers else v for k, v in arrays.items()},
        "image": image,
    }


def _keep_ids(once: dict[str, Any], name: str, call: dict[str, Any], output: Any) -> None:
    once[name] = call["input_ids"]


def _hook(stack: contextlib.ExitStack, module: torch.nn.Module, see: Callable[[dict[str, Any], Any], object]) -> None:
    """Call `see(arguments, output)` after every forward of `module`; arguments by name."""
    names = list(inspect.signature(module.forward).parameters)

    def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see({**dict(zip(names, args, strict=False)), **kwargs}, output)

    handle = module.register_forward_hook(after, with_kwargs=True)
    stack.callback(handle.remove)


@contextlib.contextmanager
def _watch_steps(pipeline: Any, steps: list[dict[str, torch.Tensor]]) -> Iterator[None]:
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
        return result

    scheduler.step = step
    try:
        yield
    finally:
        pipeline.scheduler = kept


@contextlib.contextmanager
def _magnitudes(pipeline: Any, checkpoint: Checkpoint) -> Iterator[dict[str, float]]:
    """Yield component/module → the largest absolute value in its output so far; for attention also `….scores`, Q·Kᵀ."""
    largest: dict[str, float] = {}

    def see(key: str, value: torch.Tensor) -> None:
        low, high = torch.aminmax(value)  # one pass, no copy
        largest[key] = float(np.max([largest.get(key, 0.0), -float(low), float(high)]))  # NaN stays NaN

    def see_output(key: str, _: Any, __: Any, output: Any) -> None:
        for value in _tensors(output):
            see(key, value)

    with contextlib.ExitStack() as stack:
        for component in checkpoint.family.components:
            for path, module in getattr(pipeline, component).named_modules():
                key = f"{component}/{path}" if path else component
                stack.callback(module.register_forward_hook(partial(see_output, key)).remove)
                _watch_scores(stack, module, partial(see, f"{key}.scores"))
        yield largest


def _watch_scores(stack: contextlib.ExitStack, attention: Any, see: Callable[[torch.Tensor], None]) -> None:
    """Call `see` with an attention's scores Q·Kᵀ, [queries, keys], head by head; other modules have none.

    They are what fp16 overflows in first, and no module puts them out. As the exported graphs form them: of
    diffusers' attention Q and K are scaled before the product, of CLIP's the product is scaled afterwards.
    """
    names = next((n for n in (("to_q", "to_k"), ("q_proj", "k_proj")) if all(hasattr(attention, i) for i in n)), None)
    if names is None:
        return
    heads, scale = (attention.heads, attention.scale) if hasattr(attention, "heads") else (attention.num_heads, 1.0)
    projected: dict[str, torch.Tensor] = {}

    def keep(name: str, _: Any, __: Any, output: torch.Tensor) -> None:
        projected[name] = output

    def after(_: Any, __: Any, ___: Any) -> None:
        query, key = (projected.pop(n).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for n in names)
        for q, k in zip(query, key, strict=True):
            see(q @ k.T * scale)

    for name in names:
        stack.callback(getattr(attention, name).register_forward_hook(partial(keep, name)).remove)
    stack.callback(attention.register_forward_hook(after).remove)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
