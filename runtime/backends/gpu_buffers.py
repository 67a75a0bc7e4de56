"""The buffers of a GPU's executor: one for each name and tensor, made when it is first asked for."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from turbochain.runtime.backends import cuda
from turbochain.runtime.bundle.manifest import Tensor
from turbochain.runtime.chain.plan import Constant


class Buffers:
    """Buffers on a session's GPU and in page-locked memory; they live as long as the session."""

    def __init__(self, session: cuda.Session, stream: Any) -> None:
        """Take a session; `stream` is where tables and held values go to the GPU."""
        self.session, self.stream = session, stream
        self.on_gpu: dict[tuple[str, Tensor], int] = {}
        self.page_locked: dict[tuple[str, Tensor], np.ndarray] = {}
        self._columns: dict[tuple[str, str], list[int]] = {}  # name and table → where each row is
        self._rows: dict[bytes, int] = {}  # digest of a row → where it is

    def address(self, buffer: str, tensor: Tensor) -> int:
        """Return where a buffer is on the GPU; raises OutOfMemory."""
        if (buffer, tensor) not in self.on_gpu:
            self.on_gpu[buffer, tensor] = self.session.allocate(tensor.nbytes, f"the buffer {buffer}")
        return self.on_gpu[buffer, tensor]

    def host(self, buffer: str, tensor: Tensor) -> np.ndarray:
        """Return a buffer's page-locked copy; raises OutOfMemory."""
        if (buffer, tensor) not in self.page_locked:
            self.page_locked[buffer, tensor] = self.session.pinned(tensor.shape, tensor.dtype)
        return self.page_locked[buffer, tensor]

    def constant(self, constant: Constant, feeds: Mapping[str, np.ndarray]) -> int:
        """Return the address of one row in a table's column; all its rows go to the GPU at once.

        Equal rows are there once, whichever tables they are of: those that begin later have the same timesteps.
        """
        key = (constant.name, constant.table)
        if key not in self._columns:
            rows = [row.tobytes() for row in feeds[constant.name]]
            digests = [hashlib.blake2b(row).digest() for row in rows]
            if new := {d: row for d, row in zip(digests, rows, strict=True) if d not in self._rows}:
                self._upload_rows(f"{constant.name}[{constant.table}]", new)
            self._columns[key] = [self._rows[digest] for digest in digests]
        return self._columns[key][constant.row]

    def _upload_rows(self, name: str, new: Mapping[bytes, bytes]) -> None:
        """Put rows of one size, by their digests, into one buffer, each aligned."""
        size = len(next(iter(new.values())))
        rows = np.zeros((len(new), -(-size // cuda.ALIGNMENT) * cuda.ALIGNMENT), np.uint8)
        rows[:, :size] = [np.frombuffer(row, np.uint8) for row in new.values()]
        address = self.address(name, Tensor(name, "uint8", rows.shape))
        self.upload(rows, address)
        self._rows |= {digest: address + i * rows.shape[1] for i, digest in enumerate(new)}

    def upload(self, value: np.ndarray, address: int) -> None:
        """Copy an array to the GPU and wait for that: the array may go."""
        cuda.copy(address, value.ctypes.data, value.nbytes, self.stream)
        cuda.synchronize(self.stream)
