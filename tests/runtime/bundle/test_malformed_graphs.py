"""Bytes that are no ONNX model are refused; a damaged one opens no file that onnx would open unseen."""

import random
from contextlib import suppress
from functools import partial

import numpy as np
import onnx
import pytest
from external_models import everywhere, external, found_in_folder, locations, model_of
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper

from turbochain.runtime.bundle import external_data
from turbochain.runtime.errors import BundleError


@pytest.fixture
def found_in(tmp_path):
    return partial(found_in_folder, tmp_path)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "it is empty"),
        (b"\x3a", "cut off"),  # a tag without its length
        (b"\x3a\x05abc", "after its message's end"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7fabc", "after its message's end"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "longer than ten bytes"),
        (b"\xff" * 100, "longer than ten bytes"),
        (b"\x09abc", "after its message's end"),
        (b"\x0dabc", "after its message's end"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0f", "wire type 7"),
        (b"\x00", "field number 0"),
        (b"\x02\x00", "field number 0"),
        (varint(2**32 + 7 << 3 | 2) + b"\x00", "field number"),
        (field(7, field(5, field(13, field(1, b"location") + field(2, b"\xff\xfe")))), "not UTF-8"),
        (field(7, field(5, field(13, field(1, b"location") + field(2, b"x" * 5000)))), "has 5000 bytes"),
    ],
)
def test_malformed_bytes(found_in, raw, why):
    with pytest.raises(BundleError, match=rf"model\.onnx is not an ONNX model: .*{why}"):
        found_in(raw)


def test_deep_nesting(found_in):
    def nested(levels: int) -> bytes:
        content = field(5, external("deep").SerializeToString())
        for _ in range(levels):
            content = field(1, field(5, field(6, content)))
        return field(7, content)

    for levels in (30, 31, 32, 33, 34, 3000):
        try:
            onnx.ModelProto.FromString(nested(levels))
        except DecodeError:  # so nothing that onnx can read is refused
            with pytest.raises(BundleError, match="nested deeper than 100"):
                found_in(nested(levels))
        else:
            assert found_in(nested(levels)) == {"deep"} and levels < 34


def test_the_last_of_two_keys_counts_as_in_protobuf(found_in):
    entry = field(1, b"x") + field(2, b"a") + field(1, b"location") + field(2, b"b")
    raw = field(7, field(5, field(13, entry)))
    assert found_in(raw) == locations(onnx.ModelProto.FromString(raw)) == {"b"}


class CountingBytes(bytes):
    """Bytes that count how many of them were read."""

    reads = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.reads += len(found) if isinstance(place, slice) else 1
        return found


def reads(raw: bytes) -> int:
    """How many bytes the search for locations reads of a model, until it ends or refuses."""
    data = CountingBytes(raw)
    with suppress(external_data._Malformed):
        external_data._walk(data, "ModelProto", 0, len(raw), 0, set())
    return data.reads


def test_no_byte_is_read_twice_and_tensors_not_at_all(found_in):
    nodes = [
        helper.make_node("Conv", [f"value_{i}", f"weight_{i}"], [f"value_{i + 1}"], f"/unet/block/{i}", pads=[1] * 4)
        for i in range(1_000)
    ]
    raw = model_of(external("w.data"), nodes=nodes)
    raw.graph.initializer.append(numpy_helper.from_array(np.zeros(700_000, np.float32), "inline"))
    assert found_in(raw) == {"w.data"}
    raw.graph.ClearField("node")
    rest = raw.SerializeToString()
    assert 0 < reads(rest) < 200 < len(rest)
    raw.graph.node.extend(nodes)
    assert reads(raw.SerializeToString()) < sum(node.ByteSize() + 4 for node in nodes) + 200
    empty_nodes = field(7, b"\x0a\x00" * 10_000)
    assert found_in(empty_nodes) == set() and reads(empty_nodes) == len(empty_nodes)


def test_damaged_models_are_refused_or_read_as_onnx_reads_them(found_in):
    raw, rng, outcomes = (
        everywhere().SerializeToString(),
        random.Random(7),
        {"refused": 0, "agreed": 0, "only ours": 0},
    )
    for attempt in range(500):
        damaged = bytearray(raw)
        if attempt % 2:
            del damaged[rng.randrange(1, len(raw)) :]
        for _ in range(rng.randrange(1, 6) if attempt % 5 else 0):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            theirs = locations(onnx.ModelProto.FromString(bytes(damaged)))
        except (DecodeError, UnicodeDecodeError):
            theirs = None
        try:
            ours = found_in(bytes(damaged))
        except BundleError:
            outcomes["refused"] += 1
        else:
            outcomes["only ours" if theirs is None else "agreed"] += 1
            assert theirs is None or theirs <= ours  # nothing that onnx would open stays unseen
        assert reads(bytes(damaged)) <= len(damaged)
    assert outcomes["refused"] > 100 and outcomes["agreed"] > 50, outcomes
