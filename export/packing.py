"""What the reference keeps of recorded calls: nothing twice, and nothing that follows from the rest. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from turbochain.runtime.bundle.manifest import Chain
from turbochain.runtime.checks.reference import COLUMNS, whole

Arrays = dict[str, np.ndarray]


@dataclass
class Packer:
    """Packs the calls of one reference, whose columns of the time they share."""

    rows: dict[str, dict[bytes, int]] = field(default_factory=dict)  # column → a distinct row's bytes → its place

    def pack(self, found: Mapping[str, np.ndarray], chain: Chain, table: str) -> Arrays:
        """Return what is kept of a call, of which `runtime.checks.reference.whole` makes `found` again, bit for bit.

        Of what is carried to the next row only what no next row reads is kept, which is what the last row made; of a
        column of the time [R, 1, D] the places of its rows [R, 1] int32; no noise if no row draws; not what guidance
        and a T2I-Adapter's scale make. Raises RuntimeError if the call is another one afterwards.
        """
        kept = dict(found)
        for made, read in chain.carry.items():
            if made in kept:
                kept[made] = kept[made][len(kept[read]) - 1 :]
        if not found["noise"].any():
            del kept["noise"]
        for name in found:
            if name == "guided_prediction" or name.startswith("t2i_feature_"):
                del kept[name]
            elif name in chain.feeds and chain.feeds[name].is_ == "column":
                kept[name] = self._places(name, found[name])
        again = whole(kept, self._arrays(found), chain, table)
        if changed := sorted(n for n in {*again, *found} if not np.array_equal(again.get(n, ()), found.get(n, ()))):
            raise RuntimeError(f"diffusers' call differs from what its reference would say: {', '.join(changed)}")
        return kept

    def columns(self) -> Arrays:
        """Return the distinct rows of every column [T, D] fp32, by the name that the file has for it."""
        return {COLUMNS + name: value for name, value in self._arrays(self.rows).items()}

    def _places(self, name: str, column: np.ndarray) -> np.ndarray:
        known = self.rows.setdefault(name, {})
        flat = column.reshape(-1, column.shape[-1])
        places = [known.setdefault(row.tobytes(), len(known)) for row in flat]
        return np.array(places, np.int32).reshape(column.shape[:-1])

    def _arrays(self, names: Mapping[str, object]) -> Arrays:
        found = {name: self.rows[name] for name in names if name in self.rows}
        return {name: np.stack([np.frombuffer(row, np.float32) for row in rows]) for name, rows in found.items()}
