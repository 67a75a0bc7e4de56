"""The buffers of a GPU's executor: one for each name and tensor, made when it is first asked for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from turbochain.runtime.backends import cuda
from turbochain.runtime.bundle.manifest import Tensor
from turbochain.runtime.chain.plan import Constant


class Buffers:
    """Buffers on a session's GPU and in page-locked memory; they live as long as the session."""

    def __init__(self, session: cuda.Session, stream: Any) -> None:
        """`stream`: where tables and held values go to the GPU."""
        self.session, self.stream = session, stream
        self.on_gpu: dict[tuple[str, Tensor], int] = {}
        self.page_locked: dict[tuple[str, Tensor], np.ndarray] = {}
        self._columns: dict[tuple[str, str], tuple[int, int]] = {}  # name and table → address, bytes from row to row

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
        """Return the address of a row of a table's column; all rows of it go to the GPU at once."""
        key = (constant.name, constant.table)
        if key not in self._columns:
            column = np.ascontiguousarray(feeds[constant.name])
            stride = -(-column[0].nbytes // cuda.ALIGNMENT) * cuda.ALIGNMENT
            rows = np.zeros((len(column), stride), np.uint8)
            rows[:, : column[0].nbytes] = column.reshape(len(column), -1).view(np.uint8)
            address = self.address(f"{constant.name}[{constant.table}]", Tensor(constant.name, "uint8", rows.shape))
            self.upload(rows, address)
            self._columns[key] = (address, stride)
        address, stride = self._columns[key]
        return address + constant.row * stride

    def upload(self, value: np.ndarray, address: int) -> None:
        """Copy an array to the GPU and wait for that: the array may go."""
        cuda.copy(address, value.ctypes.data, value.nbytes, self.stream)
        cuda.synchronize(self.stream)
