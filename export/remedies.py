"""Decide what each graph needs for fp16, from the largest values that diffusers' own fp32 run reached. Torch-free.

The measurement decides, not a checkpoint's config: a VAE with `force_upcast` whose values fit needs nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from turbochain.export.chains import Placed

LARGEST = 65504.0
"""The largest finite fp16 value."""

HEADROOM = 4.0
"""How far below it a recorded value has to stay: a factor of 2 for prompts and seeds that the reference has not seen,
and one of 2 for what no module puts out (x·(1 + erf) inside a GELU, the sum of conv1 and the time embedding)."""

LIMIT = LARGEST / HEADROOM
_SCORES = ".scores"

_PARTS = {"vae_decoder": r"decoder|post_quant_conv", "vae_encoder": r"encoder|quant_conv"}
"""Role → the modules of the component that its graph runs, as a pattern; a role that is not here runs all."""

_STREAM = re.compile(
    r"(?:de|en)coder\.(?:conv_in|mid_block|(?:down|up)_blocks\.\d+|.*\.(?:"
    r"resnets\.\d+(?:\.(?:conv1|conv2|conv_shortcut))?|attentions\.\d+(?:\.to_out\.\d)?|(?:up|down)samplers\.0(?:\.conv)?))"
)
"""The modules of a VAE whose output `export.rescale` can scale down."""


@dataclass(frozen=True)
class Remedy:
    """The precision that a graph is made in, and what makes it right there (JSON values)."""

    precision: str
    exponents: dict[str, int] = field(default_factory=dict)  # see export.rescale.rescale
    attention: tuple[str, ...] = ()  # see export.attention.upcast
    phrase: str = ""  # for people; empty if there is nothing to say


def decide(graphs: Mapping[str, Placed], asked: Mapping[str, str], reference: Path) -> dict[str, Remedy]:
    """Return graph → remedy, for the precisions that were asked for and the magnitudes in `reference`.

    Only fp16 is judged: fp32 and bf16 reach 3.4e38.
    """
    reached = _magnitudes(reference)
    return {
        name: remedy(spec.role, reached.get(spec.component, {})) if asked[name] == "fp16" else Remedy(asked[name])
        for name, spec in ((n, graph.spec) for n, graph in graphs.items())
    }


def remedy(role: str, reached: Mapping[str, float]) -> Remedy:
    """Return what a graph of this role needs for fp16. `reached`: module of the component → largest absolute output.

    A VAE's residual stream and `conv1` outputs are rescaled, attentions whose Q·Kᵀ comes near the limit are computed
    in fp32; for anything else that comes near it the whole graph is, as diffusers' `force_upcast` does.
    """
    part = re.compile(rf"(?:{_PARTS.get(role, '.*')})(?:\..*)?")
    mine = {m: v for m, v in reached.items() if part.fullmatch(m)}
    if not mine:
        return Remedy("fp32", phrase="fp32: the reference did not run it")
    over = {m: v for m, v in mine.items() if not v <= LIMIT}  # NaN is over
    attention = tuple(sorted(m.removesuffix(_SCORES) for m in over if m.endswith(_SCORES)))
    exponents = {
        m: math.ceil(math.log2(v / LIMIT))
        for m, v in sorted(over.items())
        if role in _PARTS and _STREAM.fullmatch(m) and math.isfinite(v)
    }
    if rest := {m: v for m, v in over.items() if m not in exponents and not m.endswith(_SCORES)}:
        worst = max(rest, key=lambda m: rest[m] if rest[m] == rest[m] else math.inf)
        return Remedy("fp32", phrase=f"fp32: {worst or 'the output'} reaches {rest[worst]:.2g}")
    phrases = []
    if exponents:
        phrases.append(f"rescaled by up to 2^-{max(exponents.values())}")
    if attention:
        more = f" and {len(attention) - 1} more" if len(attention) > 1 else ""
        phrases.append(f"fp32 attention in {attention[0]}{more}")
    return Remedy("fp16", exponents, attention, "; ".join(phrases))


def _magnitudes(reference: Path) -> dict[str, dict[str, float]]:
    """Return component → module → largest absolute output (the component's own output: the module "")."""
    from safetensors import safe_open

    found: dict[str, dict[str, float]] = {}
    with safe_open(reference, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            if key.startswith("magnitude/"):
                component, _, module = key.removeprefix("magnitude/").partition("/")
                found.setdefault(component, {})[module] = float(file.get_tensor(key)[0])
    return found
