"""Read what diffusers produced, from a bundle's reference.safetensors."""

import json
from dataclasses import dataclass

import numpy as np

from turbochain.runtime.bundle.manifest import REFERENCE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One recorded call of diffusers' pipeline; tensors as export.reference.write documents them."""

    prompt: list[str]
    seed: int
    table: str  # of the chain
    modes: frozenset[str]
    tensors: Arrays
    adapters: tuple[tuple[str, float], ...]  # SHA-256 of a LoRA's file, scale
    errors: dict[str, dict[str, float]]  # precision → metric → diffusers' own error in it; see bounds.of_image


def read_errors(bundle: Bundle) -> list[dict[str, dict[str, float]]]:
    """Return diffusers' own errors of every case of a bundle, as in `Case.errors`; the file must have been hashed."""
    from safetensors import safe_open

    with safe_open(bundle.path / REFERENCE, framework="numpy") as file:
        return [case.get("errors", {}) for case in json.loads(file.metadata()["cases"])]


def read_cases(bundle: Bundle, chain: str, *, adapters: bool = False) -> list[Case]:
    """Return the recorded cases of a chain without adapters, or those with; the file must have been hashed before
    (`Bundle.check_files`).

    Raises BundleError if there is none without.
    """
    from safetensors import safe_open

    cases: list[Case] = []
    with safe_open(bundle.path / REFERENCE, framework="numpy") as file:
        names = list(file.keys())
        for i, case in enumerate(json.loads(file.metadata()["cases"])):
            if case["chain"] == chain and bool(case.get("adapters")) == adapters:
                mine = [n for n in names if n.startswith(f"{i}/")]
                tensors = {n.removeprefix(f"{i}/"): file.get_tensor(n) for n in mine}
                modes = frozenset(case["modes"])
                applied = tuple((file, scale) for file, scale in case.get("adapters", []))
                errors = case.get("errors", {})
                cases.append(Case(case["prompt"], case["seed"], case["table"], modes, tensors, applied, errors))
    if not cases and not adapters:
        raise BundleError(f"{bundle.path / REFERENCE} has no case of the chain {chain} to check against")
    return cases
