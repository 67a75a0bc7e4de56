"""Map a component's parameters to the initializers of its graphs."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from turbochain.export.tracing.weights import Fingerprint


def name_map(
    parameters: Mapping[str, Fingerprint],
    initializers: Mapping[str, Fingerprint],
    folded: Collection[str] = (),
    factors: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, Any] | None]:
    """Return parameter name → the initializer that holds it; None if this graph has no use for it.

    For the parameters in `folded` the graph holds a value computed from them: {"folded": true}. `factors`: parameter →
    the number that the checkpoint's value was multiplied by (`rescale`); the entry has it as "factor".

    The exporter renames what it folds, so values decide: an initializer holds a parameter when it has the same values
    in the same order; its shape may differ by sizes of 1 or by groups. If several parameters have equal values, the
    exporter's own name decides.
    """
    holders: dict[Fingerprint, list[str]] = defaultdict(list)
    for initializer, values in initializers.items():
        holders[values].append(initializer)
    mapped: dict[str, dict[str, Any] | None] = {}
    for name, values in parameters.items():
        found = holders.get(values, [])
        own = [h for h in found if h.endswith(f".{name}")]
        factor = {"factor": factors[name]} if name in factors else {}
        mapped[name] = {"initializer": (own or found)[0], **factor} if found else None
    return mapped | {name: {"folded": True} for name in folded if name in parameters}
