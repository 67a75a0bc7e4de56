"""Map a component's parameters to the initializers of its graphs."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from turbochain.export.tracing.weights import Fingerprint, Parameters


def name_map(
    parameters: Parameters,
    initializers: Mapping[str, Fingerprint],
    folded: Collection[str] = (),
    factors: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Return parameter name → its "shape", and the "initializer" that holds it unless this graph has no use for it.

    If a parameter is in `folded`, the graph holds a value computed from it, and "folded" is true. `factors`: parameter
    → the number that the checkpoint's value was multiplied by (`rescale`); the entry has it as "factor".

    The exporter renames what it folds, so values decide: an initializer holds a parameter when it has the same values
    in the same order; its shape may differ by sizes of 1 or by groups. If several parameters have equal values, the
    exporter's own name decides.
    """
    holders: dict[Fingerprint, list[str]] = defaultdict(list)
    for initializer, values in initializers.items():
        holders[values].append(initializer)
    mapped: dict[str, dict[str, Any]] = {}
    for name, values in parameters.fingerprints.items():
        mapped[name] = {"shape": list(parameters.shapes[name])}
        found = holders.get(values, [])
        if name in folded:
            mapped[name]["folded"] = True
        elif found:
            own = [h for h in found if h.endswith(f".{name}")]
            mapped[name] |= {"initializer": (own or found)[0], **({"factor": factors[name]} if name in factors else {})}
    return mapped
