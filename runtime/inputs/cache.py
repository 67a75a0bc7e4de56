"""Keep what the stages of the prompt made, so that a repeated prompt skips the text encoders."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

Embeds = Mapping[str, np.ndarray]


class PromptCache:
    """Embeddings by chain, token ids and adapters: least recently used out first, bounded in bytes.

    The caller holds a lock.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Embeds] = OrderedDict()

    def __len__(self) -> int:
        """Return how many prompts are kept."""
        return len(self._entries)

    def get(self, keys: Sequence[Hashable]) -> dict[str, np.ndarray] | None:
        """Return the embeddings of a whole batch, name → [B, …]; None unless every prompt in it is known."""
        if any(key not in self._entries for key in keys):
            return None
        for key in keys:
            self._entries.move_to_end(key)
        rows = [self._entries[key] for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def put(self, keys: Sequence[Hashable], embeds: Embeds) -> None:
        """Keep copies of a batch's embeddings, name → [B, …]; one larger than the bound is not kept."""
        for i, key in enumerate(keys):
            row = {name: value[i].copy() for name, value in embeds.items()}
            size = _bytes(row)
            if key in self._entries or size > self.limit_bytes:
                continue
            self._entries[key] = row
            self.bytes += size
            while self.bytes > self.limit_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= _bytes(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0


def _bytes(row: Embeds) -> int:
    return sum(value.nbytes for value in row.values())
