"""Classifier-free guidance in a call: whether it is on, and the negative prompt."""

from collections.abc import Collection

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.numbers import is_number

GUIDANCE, NEGATIVE_PROMPT = "guidance", "negative_prompt"
"""The modes of a chain that arguments switch on: a scale above 1, and a negative prompt that is given beside it.

A chain without the second one encodes "" if no negative prompt is given; one with it reads zeros then.
"""
_MOST = 3.4028234663852886e38
"""The largest finite fp32 value."""


def check_scale(chain: OpenChain, guidance_scale: object) -> float:
    """Return the guidance scale of a call; None: the bundle's default. Raises InputError if it is no number, or if it
    is above 1 and the chain cannot follow it."""
    default = chain.chain.defaults.get("guidance_scale", 0.0)
    scale = default if guidance_scale is None else guidance_scale
    if not is_number(scale) or not -_MOST <= (scale if isinstance(scale, int) else float(scale)) <= _MOST:
        raise InputError(
            f"guidance_scale={guidance_scale!r}: a finite number was expected, in fp32; leave it out for the bundle's, "
            f"{default:g}"
        )
    if scale > 1 and GUIDANCE not in chain.chain.modes and not embeds_guidance(chain):
        raise InputError(
            f"guidance_scale={guidance_scale!r}: the chain {chain.name} has no guidance; leave it out or give 0.0"
        )
    return float(scale)


def embeds_guidance(chain: OpenChain) -> bool:
    """Return whether the UNet reads the guidance scale itself, so that no negative prompt is drawn."""
    return any(entry.guidance_scale is not None for entry in chain.chain.tables.values())


def modes_of(chain: OpenChain, scale: float, negative: bool, others: Collection[str]) -> frozenset[str]:
    """Return the modes of a call, `others` among them; `negative`: whether it gives a negative prompt.

    Raises InputError if the chain lacks one of `others`.
    """
    if isinstance(others, str):
        raise InputError(f"modes={others!r}: a list of names was expected; give [{others!r}]")
    if unknown := sorted(set(others) - set(chain.chain.modes)):
        has = ", ".join(chain.chain.modes) or "none"
        raise InputError(f"modes={unknown}: the chain {chain.name} has {has}; choose from these")
    found = {*others}
    if scale > 1 and GUIDANCE in chain.chain.modes:
        found.add(GUIDANCE)
    if GUIDANCE in found and negative and NEGATIVE_PROMPT in chain.chain.modes:
        found.add(NEGATIVE_PROMPT)
    return frozenset(found)
