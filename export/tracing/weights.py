"""Write the constants of a component's graphs: each weight once, in data files that all of its graphs name.

A constant goes to one of three places. One that is a parameter of the component is in the shared files
`graphs/COMPONENT.PRECISION-0.data`, `-1.data` and so on, which another size, batch or variant reads as well. Any other
one (a mask, a position table, something computed for one size) is in the graph's own file, `graphs/NAME.onnx.data`.
What is small is in the .onnx file itself.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

LIMIT = 2**30
"""Bytes of a shared data file at most, unless one tensor alone is larger."""

INLINE = 2**10
"""Bytes up to which a constant stays in the .onnx file: a name, offset and length there take about 100, and ONNX
Runtime maps a page of 4096 for each. Shapes and scalars, which differ from size to size, are all far below it. It is
the default of onnx.save_model, too."""

_PAGE = 4096  # where a large tensor starts, as ONNX advises for mapping
_LARGE = 2**20  # bytes from which a page is no waste
_LINE = 64  # a cache line, where all others start: no element lies across two


@dataclass(frozen=True)
class Fingerprint:
    """What tells a tensor's values from others'; its shape does not count."""

    dtype: str
    nbytes: int
    sha256: bytes


def fingerprint(array: np.ndarray) -> Fingerprint:
    """Return the fingerprint of an array of any shape, read in C order."""
    raw = _raw(array)
    return Fingerprint(str(array.dtype), len(raw), hashlib.sha256(raw).digest())


class Parameters:
    """The parameters of a loaded component, hashed once for all graphs that are traced of it."""

    def __init__(self, model: nn.Module) -> None:
        """Hash the parameters of `model`, which must stay as they are for as long as this object is used."""
        self.fingerprints: dict[str, Fingerprint] = {}
        """Parameter → fingerprint."""
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        """Parameter → shape."""
        self._model = model  # keeps the memory at `_known` from being used for something else
        self._known: dict[tuple[int, str, int], Fingerprint] = {}
        for name, parameter in model.named_parameters():
            array = _numpy(parameter.detach())
            self.fingerprints[name] = fingerprint(array)
            if array.flags.c_contiguous:
                self._known[_memory(array)] = self.fingerprints[name]
        self._all = set(self.fingerprints.values())

    def fingerprint(self, array: np.ndarray) -> Fingerprint:
        """Return an array's fingerprint, without reading it if it is the memory of a parameter."""
        known = self._known.get(_memory(array)) if array.flags.c_contiguous else None
        return known or fingerprint(array)

    def __contains__(self, value: Fingerprint) -> bool:
        """Return whether a parameter has these values."""
        return value in self._all


class DataFiles:
    """One data file, or several of a limited size, that hold each distinct tensor once; they grow graph by graph."""

    def __init__(self, folder: Path, name: str, limit: float = math.inf) -> None:
        """Begin with no file; `name`: the files' name, with `{}` for a number if there may be several."""
        self._folder, self._name, self._limit = folder, name, limit
        self._number, self._end = 0, 0  # the file that grows, and its size
        self._places: dict[Fingerprint, tuple[str, int]] = {}  # the values → file name, offset

    def place(self, array: np.ndarray, values: Fingerprint) -> tuple[str, int]:
        """Return the file name and the offset in bytes of an array, after writing it if it is not there yet."""
        if values not in self._places:
            self._places[values] = self._append(array)
        return self._places[values]

    def _append(self, array: np.ndarray) -> tuple[str, int]:
        alignment = _PAGE if array.nbytes >= _LARGE else _LINE
        padding = -self._end % alignment
        if self._end and self._end + padding + array.nbytes > self._limit:
            self._number, self._end, padding = self._number + 1, 0, 0
        name, offset = self._name.format(self._number), self._end + padding
        with (self._folder / name).open("ab" if self._end else "wb") as file:
            file.write(bytes(padding))
            file.write(_raw(array))
        self._end = offset + array.nbytes
        return name, offset


def shared(folder: Path, component: str, precision: str) -> DataFiles:
    """Return the data files for all graphs of a component in one precision, empty, in `folder`."""
    return DataFiles(folder, f"{component}.{precision}-{{}}.data", LIMIT)


@dataclass(frozen=True)
class Written:
    """Where the constants of a graph are, and what they are."""

    data: tuple[str, ...]  # the names of the data files that it reads, in the order in which it first names them
    initializers: Mapping[str, Fingerprint]  # of every one, inline or not


def write(model: ir.Model, folder: Path, name: str, parameters: Parameters, files: DataFiles) -> Written:
    """Move the constants of a traced graph into data files, tensor by tensor; `model` then only names them.

    `folder`: of the graph's file, `name`.onnx; `files`: those that the graphs of this component share.
    """
    own = DataFiles(folder, f"{name}.onnx.data")
    found: dict[str, Fingerprint] = {}
    data: dict[str, None] = {}
    for initializer, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        array = tensor.numpy()
        found[initializer] = values = parameters.fingerprint(array)
        if array.nbytes <= INLINE:
            continue
        location, offset = (files if values in parameters else own).place(array, values)
        data[location] = None
        value.const_value = ir.ExternalTensor(
            location, offset, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=initializer, base_dir=folder
        )
    return Written(tuple(data), found)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as onnx gives an initializer's: bfloat16, which numpy lacks, has ml_dtypes' type."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _memory(array: np.ndarray) -> tuple[int, str, int]:
    return array.ctypes.data, str(array.dtype), array.nbytes
