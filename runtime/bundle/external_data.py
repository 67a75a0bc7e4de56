"""Which files an .onnx file makes its reader open, found without the onnx package.

ONNX lets every tensor name a file that holds its data. Before a backend parses a graph, these names are
read from the protobuf bytes, and each must be a file that the bundle's manifest covers.
"""

import hashlib
import json
import mmap
import os
import posixpath
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from turbochain.runtime.bundle import hashing
from turbochain.runtime.bundle.paths import AnyPath, blobs, resolve_inside
from turbochain.runtime.errors import BundleError

# Every message of onnx.proto that can hold a TensorProto: {message: {field number: message}}.
_FIELDS = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
_DEEPEST = 100  # protobuf's own limit
_LONGEST = 4096  # bytes; no path is longer
_WALK = 1  # raised with every change to the places where a location is looked for: stamps of before are not used then
_Data = bytes | mmap.mmap


class _Malformed(ValueError):
    """These bytes are no ONNX model; the message says why, without the file's name."""


def external_locations(path: str | os.PathLike[str]) -> set[str]:
    """Return every external-data `location` in the .onnx file, as it stands there.

    A tensor's location counts whatever its `data_location` says, since readers differ in what they make of
    the two. Raises BundleError for bytes that are no ONNX model, OSError when the file cannot be read.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return _locations(b"", str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _locations(data, str(path))


def check_form(root: AnyPath, relative_onnx: str, allowed: Collection[str], form: bytes) -> None:
    """Raise BundleError unless each location in another form of an .onnx file names, from that file's folder, an
    allowed file.

    `relative_onnx` and `allowed` are relative to `root`, as in `check_external`; `form` are the bytes that are parsed.
    """
    if problem := _problem(root, relative_onnx, _locations(form, f"the form of {relative_onnx}"), allowed):
        raise BundleError(f"the form of {problem}")


def _locations(data: _Data, name: str) -> set[str]:
    found: set[str] = set()
    try:
        if not len(data):
            raise _Malformed("it is empty")
        _walk(data, "ModelProto", 0, len(data), 0, found)
    except _Malformed as why:
        raise BundleError(f"{name} is not an ONNX model: {why}") from None
    return found


def check_external(root: AnyPath, relative_onnx: str, allowed: Collection[str], sha256: str | None = None) -> None:
    """Raise BundleError unless each location in the .onnx file names, from its folder, an allowed file.

    `relative_onnx` and `allowed` are relative to `root`. A location with ".." is refused wherever it leads,
    as ONNX Runtime does. An .onnx file behind a symbolic link is refused too, since readers
    differ in the folder that they then start from; in the hub's cache it is allowed, because no reader meets it there
    (`Bundle.plain`).

    `sha256` is the file's digest if it was verified just now. The file's locations are then kept under it with the hash
    stamps, and not looked for again in any file with that digest. A stamp can only
    save work: if it is damaged, or does not lead to allowed files, the file itself is read.
    """
    path = resolve_inside(root, relative_onnx)
    named = Path(os.path.realpath(root), os.path.normpath(relative_onnx))
    if path != named and path.parent != blobs(root):
        raise BundleError(f"{relative_onnx!r} is behind a symbolic link, which an ONNX graph must not be")
    stamped = None if sha256 is None else _stamped(sha256)
    if stamped is not None and _problem(root, relative_onnx, stamped, allowed) is None:
        return
    try:
        locations = external_locations(path)
    except OSError as error:
        raise BundleError(f"{relative_onnx!r} cannot be read: {error.strerror}") from None
    if problem := _problem(root, relative_onnx, locations, allowed):
        raise BundleError(problem)
    if sha256 is not None:
        _leave_stamp(path, sha256, locations)


def _problem(root: AnyPath, relative_onnx: str, locations: Collection[str], allowed: Collection[str]) -> str | None:
    for location in sorted(locations):
        target = posixpath.join(posixpath.dirname(relative_onnx), location)
        try:
            resolve_inside(root, target)
        except BundleError as why:
            return f"{relative_onnx!r} reads a file outside: {why}"
        if posixpath.normpath(target) not in allowed:
            return f"{relative_onnx!r} reads {location!r}, which the manifest does not list"
    return None


def _stamp(sha256: str, locations: Collection[str]) -> str:
    """Return two lines: the locations in a file with this digest, and a checksum of the first line."""
    content = json.dumps([_WALK, sha256, sorted(locations)])
    return f"{content}\n{hashlib.sha256(content.encode()).hexdigest()}\n"


def _stamp_file(sha256: str) -> Path:
    return hashing.user_cache() / "hashes" / f"{sha256}.external"


def _stamped(sha256: str) -> list[str] | None:
    """Return the locations in a file with this digest, or None if no sound stamp has them."""
    try:
        text = _stamp_file(sha256).read_text("utf-8")
        _, _, locations = json.loads(text.partition("\n")[0])
        return locations if text == _stamp(sha256, locations) else None
    except (OSError, ValueError, TypeError, RuntimeError):  # unreadable, not JSON, not a list, no home folder
        return None


def _leave_stamp(path: Path, sha256: str, locations: Collection[str]) -> None:
    with suppress(OSError, ValueError, RuntimeError):
        if hashing.digest(path) == sha256:  # it may have changed since it was verified
            hashing.leave(_stamp_file(sha256), _stamp(sha256, locations))


def _walk(data: _Data, message: str, start: int, end: int, depth: int, found: set[str]) -> None:
    if depth > _DEEPEST:
        raise _Malformed(f"it is nested deeper than {_DEEPEST} messages")
    children = _FIELDS[message]
    for number, at, stop in _fields(data, start, end):
        child = children.get(number)
        if child == "StringStringEntryProto":
            entry = {field: (first, last) for field, first, last in _fields(data, at, stop)}
            if data[slice(*entry.get(1, (0, 0)))] == b"location":
                found.add(_text(data, *entry.get(2, (0, 0))))
        elif child:
            _walk(data, child, at, stop, depth + 1, found)


def _text(data: _Data, start: int, end: int) -> str:
    if end - start > _LONGEST:
        raise _Malformed(f"an external-data location has {end - start} bytes")
    try:
        return data[start:end].decode()
    except UnicodeDecodeError:
        raise _Malformed("an external-data location is not UTF-8") from None


def _fields(data: _Data, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, first byte, byte after the last) of the length-delimited fields of a message."""
    at = start
    while at < end:
        tag, at = varint(data, at, end)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise _Malformed(f"field number {number} at byte {at}")
        if wire_type == 0:
            _, at = varint(data, at, end)
        elif wire_type == 1:
            at += 8
        elif wire_type == 2:
            size, at = varint(data, at, end)
            if at + size <= end:
                yield number, at, at + size
            at += size
        elif wire_type == 5:
            at += 4
        else:  # 3 and 4 are groups, which ONNX has none of; 6 and 7 do not exist
            raise _Malformed(f"wire type {wire_type} at byte {at}")
        if at > end:
            raise _Malformed(f"a field ends at byte {at}, after its message's end at {end}")


def varint(data: _Data, at: int, end: int) -> tuple[int, int]:
    """Return the number at `at` and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _Malformed(f"a number is cut off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed(f"a number is longer than ten bytes at byte {at}")
