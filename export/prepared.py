"""What the first phase of an export finds out, and all later ones need."""

from dataclasses import dataclass

from turbochain.export import families
from turbochain.export.chains import Layout
from turbochain.export.families import Family
from turbochain.export.requested import Requested
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime.bundle.manifest import Chain, Origin, TokenizerFile


@dataclass(frozen=True)
class Prepared:
    """A checkpoint on this disk, and what the manifest says of it; plain JSON between processes."""

    checkpoint: Checkpoint
    origin: Origin
    zeros: bool  # whether no negative prompt means zeros: see `Layout`
    chains: dict[str, Chain]
    tokenizers: dict[str, TokenizerFile]  # chain input → tokenizer

    @property
    def family(self) -> Family:
        """Return the checkpoint's family, without a look at its files."""
        return families.of(self.origin.pipeline_class)

    def layout(self, requested: Requested) -> Layout:
        """Return what decides the chains and graphs."""
        K = next(iter(self.chains.values())).K
        return requested.layout(self.family, self.checkpoint.configs, K, self.zeros)

    @property
    def weight_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum(record.size for part in self.origin.parts.values() for record in part.weights.values())

    @property
    def files(self) -> list[str]:
        """Return the files of the bundle that were written."""
        terms = {name for part in self.origin.parts.values() for name in part.terms}
        return [*sorted(terms), *(tokenizer.file for tokenizer in self.tokenizers.values())]
