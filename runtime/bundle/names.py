"""Read `names.json`: what became of a component's parameters in a graph."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BundleError


@dataclass(frozen=True)
class Parameter:
    """A parameter of the checkpoint in one graph."""

    shape: tuple[int, ...]  # in the checkpoint
    initializer: str = ""  # the graph's, which has its values
    factor: float = 1.0  # by which the checkpoint's values were multiplied
    folded: bool = False  # the graph holds a part of it, or it or the table a result computed from it

    @property
    def unused(self) -> bool:
        """Return whether the graph has no use for it, so that another value of it changes nothing."""
        return not self.initializer and not self.folded


def read_names(bundle: Bundle, name: str) -> dict[str, Parameter]:
    """Return every parameter of a graph's component by its name in the checkpoint; the file is hashed first.

    Raises BundleError if the file is damaged, or is from before shapes were in it.
    """
    file = bundle.manifest.graphs[name].names
    bundle.check_files([file])
    try:
        found: dict[str, Parameter] = strict_json.convert(
            dict[str, Parameter], json.loads((bundle.path / file).read_bytes())
        )
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{file} does not tell the shape of each parameter ({error}), as it does in bundles of today; build this "
            "one again with build-engine SOURCE"
        ) from None
    return found


def shapes(bundle: Bundle) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return component → parameter → shape for all components that LoRA files name. Raises BundleError."""
    from turbochain.runtime.inputs.adapter_names import PREFIXES

    first = {graph.component: name for name, graph in reversed(bundle.manifest.graphs.items())}
    named: Mapping[str, str] = {component: first[component] for component in PREFIXES if component in first}
    return {c: {name: p.shape for name, p in read_names(bundle, graph).items()} for c, graph in named.items()}
