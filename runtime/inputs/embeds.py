"""A prompt that the caller has encoded already: diffusers' `prompt_embeds` and `pooled_prompt_embeds`."""

import numpy as np

from turbochain.runtime.chain import wiring
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.arrays import Array, check_array

STATES = ("prompt_embeds", "prompt_embeds_2")
"""The tensors that lie side by side, on the last axis, in diffusers' `prompt_embeds`: one of each text encoder."""
POOLED = "pooled_prompt_embeds"


NEGATIVE = "negative_"
"""How arguments' and tensors' names begin if they belong to the negative prompt."""


def check_embeds(
    chain: OpenChain, prompt_embeds: object, pooled_prompt_embeds: object, repeats: int, prefix: str = ""
) -> tuple[tuple[str, Array], ...]:
    """Return what the chain's text encoders would make, [N, …] for each by its name; () if no embeds are given.

    `prompt_embeds` [P, tokens, width] fp32 and, if the chain reads one, `pooled_prompt_embeds` [P, width] are each
    repeated for N = P · repeats pictures. `prefix`: `NEGATIVE` if they are those of the negative prompt. Raises
    InputError if a shape, a dtype or one of the two is wrong.
    """
    if prompt_embeds is None and pooled_prompt_embeds is None:
        return ()
    whole, part = f"{prefix}prompt_embeds", prefix + POOLED
    stages = [s for s in chain.chain.stages if s.when == "prompt"]
    made = {t.name for stage in stages for t in wiring.outputs(stage, chain.graphs)}
    states, pooled = [prefix + n for n in STATES if prefix + n in made], part in made
    if not states:
        raise InputError(f"{whole}: the chain {chain.name} reads no {prefix.replace('_', ' ')}prompt")
    if prompt_embeds is None:
        raise InputError(f"{part} was given without {whole}: give both, or the prompt")
    if pooled != (pooled_prompt_embeds is not None):
        expected = f"is expected beside {whole}" if pooled else "was given, and this model reads none"
        raise InputError(f"{part} {expected}")
    widths = [chain.tensors[name].shape[-1] for name in states]
    prompts = 1
    if isinstance(prompt_embeds, np.ndarray) and prompt_embeds.ndim == 3:
        prompts = max(len(prompt_embeds), 1)
    shape: tuple[int, ...] = (prompts, chain.tensors[states[0]].shape[1], sum(widths))
    value = check_array(whole, prompt_embeds, "float32", shape).value
    given = dict(zip(states, np.split(value, np.cumsum(widths)[:-1], axis=-1), strict=True))
    if pooled:
        shape = (prompts, *chain.tensors[part].shape[1:])
        given[part] = check_array(part, pooled_prompt_embeds, "float32", shape).value
    return tuple((name, Array(np.repeat(array, repeats, axis=0))) for name, array in given.items())
