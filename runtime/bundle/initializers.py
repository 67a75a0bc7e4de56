"""The values of an ONNX graph's initializers, mapped from its files, found without the onnx package."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbochain.runtime.bundle.external_data import varint

# Field numbers of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, of GraphProto
_DIMS, _DTYPE, _FLOATS, _NAME, _RAW, _EXTERNAL = 1, 2, 4, 8, 9, 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_FLOAT = 1  # of TensorProto.DataType


@dataclass(frozen=True)
class _Span:
    """Some bytes of the file."""

    begin: int
    end: int


def read_fp32(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """Return the float32 initializers of these names, read-only and mapped; others are left out.

    The file must have been hashed and its locations checked (`Bundle.check_files`).
    """
    data, found = path.read_bytes(), {}
    for graph in _of(data, _Span(0, len(data)), _GRAPH):
        for tensor in _of(data, graph, _INITIALIZER):
            fields = list(_fields(data, tensor))
            name = next((data[v.begin : v.end].decode() for n, v in fields if n == _NAME and isinstance(v, _Span)), "")
            if name in wanted and (_DTYPE, _FLOAT) in fields:
                dims = [v for n, v in fields if n == _DIMS and isinstance(v, int)]
                found[name] = _values(path, data, dict(fields), dims, _entries(data, tensor))
    return found


def _values(
    path: Path, data: bytes, fields: dict[int, "_Span | int"], dims: list[int], external: dict[str, str]
) -> np.ndarray:
    if "location" in external:
        offset, count = int(external.get("offset", 0)), int(np.prod(dims))
        mapped = np.memmap(path.parent / external["location"], np.float32, "r", offset, (count,))
        return mapped.reshape(dims)
    inside = fields.get(_RAW, fields.get(_FLOATS, _Span(0, 0)))
    assert isinstance(inside, _Span)
    return np.frombuffer(data[inside.begin : inside.end], np.float32).reshape(dims)


def _entries(data: bytes, tensor: _Span) -> dict[str, str]:
    """Return the entries that say where a tensor's external data is."""
    found = {}
    for entry in _of(data, tensor, _EXTERNAL):
        texts = {n: data[v.begin : v.end].decode() for n, v in _fields(data, entry) if isinstance(v, _Span)}
        found[texts[_KEY]] = texts[_VALUE]
    return found


def _of(data: bytes, message: _Span, number: int) -> list[_Span]:
    return [value for found, value in _fields(data, message) if found == number and isinstance(value, _Span)]


def _fields(data: bytes, message: _Span) -> Iterator[tuple[int, _Span | int]]:
    """Yield the number and the value of each field: a whole number, or the bytes of what has a length."""
    at = message.begin
    while at < message.end:
        tag, at = varint(data, at, message.end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(data, at, message.end)
            yield number, value
        elif kind == 2:
            size, at = varint(data, at, message.end)
            yield number, _Span(at, at + size)
            at += size
        else:
            at += 8 if kind == 1 else 4
