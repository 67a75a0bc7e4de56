"""The memory of the GPUs, and page-locked memory of the host: blocks with guards, never given back to the process."""

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 512  # bytes
_GUARD = 512  # bytes before and after a block
_GUARDED, _UNWRITTEN = 0xA5, 0xFF


@dataclass(eq=False)
class Block:
    """A block that was allocated; `device` is None for page-locked memory of the host."""

    address: int
    size: int
    device: int | None
    memory: np.ndarray  # [guard, block, guard] and what aligns it
    offset: int  # of the block in `memory`
    freed: bool = False

    @property
    def own(self) -> np.ndarray:
        """The bytes of the block itself."""
        return self.memory[self.offset : self.offset + self.size]

    def damage(self) -> str | None:
        """What was written where nothing may be."""
        end = self.offset + self.size
        if (self.memory[: self.offset] != _GUARDED).any() or (self.memory[end:] != _GUARDED).any():
            return f"something was written beside a block of {self.size} bytes"
        if self.freed and (self.own != _UNWRITTEN).any():
            return f"something was written into a block of {self.size} bytes after it was freed"
        return None


class Memory:
    """Every block that there ever was: an address is never used twice."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._blocks: list[Block] = []

    @property
    def live(self) -> list[Block]:
        """The blocks that were not freed."""
        return [block for block in self._blocks if not block.freed]

    def allocate(self, size: int, device: int | None) -> Block:
        """A new block of unwritten memory."""
        memory = np.full(size + 2 * _GUARD + ALIGNMENT, _GUARDED, np.uint8)
        offset = _GUARD + -(memory.ctypes.data + _GUARD) % ALIGNMENT
        block = Block(memory.ctypes.data + offset, size, device, memory, offset)
        block.own[:] = _UNWRITTEN
        at = bisect.bisect(self._addresses, block.address)
        self._addresses.insert(at, block.address)
        self._blocks.insert(at, block)
        return block

    def free(self, block: Block) -> None:
        """Let nobody use a block any more; what is written to it from now on will be seen."""
        block.freed = True
        block.own[:] = _UNWRITTEN

    def find(self, address: int) -> Block | None:
        """The block, freed or not, that an address lies in; None for memory of the host that is not page-locked."""
        at = bisect.bisect(self._addresses, address) - 1
        if at >= 0 and address < self._addresses[at] + max(self._blocks[at].size, 1):
            return self._blocks[at]
        return None

    def wrong(self, address: int, size: int) -> str | None:
        """What is wrong with so many bytes at an address that must be in one block; None if nothing is."""
        block = self.find(address)
        if block is None:
            return f"{size} bytes at {address:#x} were never allocated"
        if block.freed:
            return f"{size} bytes of a block that was freed"
        if address + size > block.address + block.size:
            return f"{size} bytes at byte {address - block.address} of a block of {block.size}"
        return None

    def damage(self) -> list[str]:
        """What was written where nothing may be, in all blocks."""
        return [damage for block in self._blocks if (damage := block.damage())]


def move(target: int, source: int, size: int) -> None:
    """Copy bytes between two addresses."""
    ctypes.memmove(target, source, size)


def fill(target: int, size: int) -> None:
    """Make bytes what they are before the first write."""
    ctypes.memset(target, _UNWRITTEN, size)
