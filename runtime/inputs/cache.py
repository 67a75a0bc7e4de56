"""Keep what stages before the loop made, so that a repeated prompt or picture skips its encoder."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

Made = Mapping[str, np.ndarray]
ENTRIES = 256
"""Entries of a cache at most. Those of small pictures are so small that a bound in bytes would let a server grow for
hours, by pictures that are drawn with another seed each time and never asked for again."""


class StageCache:
    """What graphs made of one picture's inputs: least recently used out first, bounded in bytes and in number.

    The caller holds a lock.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Made] = OrderedDict()

    def __len__(self) -> int:
        """Return how many entries are kept: one of each graph and input."""
        return len(self._entries)

    def get(self, keys: Sequence[Hashable]) -> dict[str, np.ndarray] | None:
        """Return the kept results of a whole batch, name → [B, …]; None if any row is unknown."""
        if any(key not in self._entries for key in keys):
            return None
        for key in keys:
            self._entries.move_to_end(key)
        rows = [self._entries[key] for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def put(self, keys: Sequence[Hashable], made: Made) -> None:
        """Keep copies of what was made of a batch, name → [B, …]; a row larger than the bound is not kept."""
        for i, key in enumerate(keys):
            row = {name: value[i].copy() for name, value in made.items()}
            size = _bytes(row)
            if key in self._entries or size > self.limit_bytes:
                continue
            self._entries[key] = row
            self.bytes += size
            while self.bytes > self.limit_bytes or len(self._entries) > ENTRIES:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= _bytes(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0


def _bytes(row: Made) -> int:
    return sum(value.nbytes for value in row.values())
