"""Read what diffusers produced, from a bundle's reference.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from turbochain.runtime.bundle.manifest import REFERENCE, Chain
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError
from turbochain.runtime.inputs.embeds import NEGATIVE

Arrays = dict[str, np.ndarray]
Errors = dict[str, dict[str, float]]
"""Precision → metric → diffusers' own error in it; see bounds.of_image."""

COLUMNS = "columns/"
"""In front of the name of a column of the time: its distinct rows, once for all cases."""

SAMPLED = "sampled/"
"""In front of the name of a tensor of which an excerpt has a sample alone."""

_EVERY = 61  # a prime, so that a sample has values of all channels and of all places


def sample(value: np.ndarray) -> np.ndarray:
    """Return every 61st value, [N]."""
    return value.reshape(-1)[::_EVERY].copy()  # a view would keep all of it in memory


@dataclass(frozen=True)
class Case:
    """One recorded call of diffusers' pipeline; tensors as export.reference.write documents them.

    An excerpt has the tensors of the loop for its first rows alone, and of what is carried that of the last row too.
    """

    prompt: list[str]
    seed: int
    table: str  # of the chain
    modes: frozenset[str]
    tensors: Arrays
    adapters: tuple[tuple[str, float], ...]  # SHA-256 of a LoRA's file, scale
    errors: Errors
    made: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    # (name, row) → what an engine made, where an excerpt has a sample: other stages are fed with it

    @property
    def has_samples(self) -> bool:
        """Return whether there are tensors of which a sample alone was kept."""
        return any(name.startswith(SAMPLED) for name in self.tensors)


@dataclass(frozen=True)
class Reference:
    """What was recorded for a chain."""

    cases: list[Case]
    errors: list[Errors]  # of every case of the bundle


def read(bundle: Bundle, chain: str, *, adapters: bool = False) -> Reference:
    """Return the recorded cases of a chain without adapters, or those with; the file must have been hashed before
    (`Bundle.check_files`).

    Raises BundleError if there is none without.
    """
    from safetensors import safe_open

    cases: list[Case] = []
    with safe_open(bundle.path / REFERENCE, framework="numpy") as file:
        names, told = list(file.keys()), json.loads(file.metadata()["cases"])
        columns = {n.removeprefix(COLUMNS): file.get_tensor(n) for n in names if n.startswith(COLUMNS)}
        for i, case in enumerate(told):
            if case["chain"] == chain and bool(case.get("adapters")) == adapters:
                kept = {n.removeprefix(f"{i}/"): file.get_tensor(n) for n in names if n.startswith(f"{i}/")}
                tensors = whole(kept, columns, bundle.manifest.chains[chain], case["table"])
                applied = tuple((file, scale) for file, scale in case.get("adapters", []))
                modes, errors = frozenset(case["modes"]), case.get("errors", {})
                cases.append(Case(case["prompt"], case["seed"], case["table"], modes, tensors, applied, errors))
    if not cases and not adapters:
        raise BundleError(f"{bundle.path / REFERENCE} has no case of the chain {chain} to check against")
    return Reference(cases, [case.get("errors", {}) for case in told])


def whole(kept: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], chain: Chain, table: str) -> Arrays:
    """Restore the tensors of a call from those that the file keeps: the inverse of `export.packing.Packer.pack`.

    `columns`: the distinct rows of each column of the time. `table`: the one that the call followed.
    """
    found = {name: columns[name][value] if name in columns else value for name, value in kept.items()}
    found.setdefault("noise", np.zeros_like(found["prediction"]))  # of a call that draws none in its steps
    for made, read in chain.carry.items():
        if made in found:
            is_excerpt = len(found[read]) < chain.tables[table].rows
            left = found[made] if is_excerpt else found[made][-1:]  # a file may keep all rows that were made
            found[made] = np.concatenate([found[read][1:], left])
    return found | products(found)


def products(found: Mapping[str, np.ndarray]) -> Arrays:
    """Return what guidance and a T2I-Adapter's scale make of the tensors of a call."""
    made: Arrays = {}
    if (negative := found.get(f"{NEGATIVE}prediction")) is not None:
        made["guided_prediction"] = negative + found["guidance_scale"] * (found["prediction"] - negative)
    for name in [name for name in found if name.startswith("t2i_state_")]:
        scale = found["adapter_conditioning_scale"].reshape(-1, *[1] * found[name].ndim)
        made[name.replace("state", "feature")] = scale * found[name]
    return made
