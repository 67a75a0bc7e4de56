"""The largest values that a pipeline's modules put out: they decide whether fp16 can hold them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def magnitudes(models: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, float]]:
    """Yield component/module → the largest absolute value in its output so far; for attention also `….scores`, Q·Kᵀ."""
    largest: dict[str, float] = {}

    def see(key: str, value: torch.Tensor) -> None:
        low, high = torch.aminmax(value)  # one pass, no copy
        largest[key] = float(np.max([largest.get(key, 0.0), -float(low), float(high)]))  # NaN stays NaN

    def see_output(key: str, _: Any, __: Any, output: Any) -> None:
        for value in _tensors(output):
            see(key, value)

    with contextlib.ExitStack() as stack:
        for component, model in models.items():
            for path, module in model.named_modules():
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
