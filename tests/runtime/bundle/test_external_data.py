import hashlib
import os
import random
from contextlib import suppress

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from turbochain.runtime.bundle import external_data
from turbochain.runtime.bundle.external_data import check_external, check_form, external_locations
from turbochain.runtime.errors import BundleError


def external(location: str, dims: tuple[int, ...] = (4,)) -> TensorProto:
    tensor = TensorProto(name=f"t_{location}", data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*initializers: TensorProto, nodes=(), functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    return helper.make_model(graph, functions=functions)


def branch(name: str, *nodes, tensor: TensorProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [], initializer=[tensor])


def everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that can hold one, each with a location of its own."""
    inner = helper.make_node(
        "If",
        ["c"],
        ["o"],
        then_branch=branch("i", tensor=external("if2")),
        else_branch=helper.make_graph([], "e", [], []),
    )
    nodes = [
        helper.make_node(
            "If",
            ["c"],
            ["o"],
            then_branch=branch("t", inner, tensor=external("if1")),
            else_branch=branch("f", tensor=external("else")),
        ),
        helper.make_node("Constant", [], ["k"], value=external("constant"), doc_string="location"),
        helper.make_node("Many", [], ["k"], tensors=[external("tensors0"), external("tensors1")]),
        helper.make_node("Graphs", [], ["k"], graphs=[branch("x", tensor=external("graphs"))]),
    ]
    sparse = onnx.SparseTensorProto(values=external("values"), indices=external("indices"), dims=[9])
    nodes.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))
    nodes[-1].attribute.add(name="list", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.add(
        values=external("list values"), indices=external("list indices"), dims=[9]
    )
    function = helper.make_function(
        "d", "F", [], ["o"], [helper.make_node("Constant", [], ["o"], value=external("function"))], []
    )
    function.attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("default"))
    model = model_of(external("initializer"), external("folder/Ω.data"), nodes=nodes, functions=[function])
    model.graph.sparse_initializer.add(values=external("sparse v"), indices=external("sparse i"), dims=[9])
    model.graph.initializer.append(numpy_helper.from_array(np.arange(30, dtype=np.float32), "inline"))
    helper.set_model_props(model, {"location": "not a file", "k": "v"})
    training = model.training_info.add()
    training.algorithm.CopyFrom(branch("algorithm", tensor=external("algorithm")))
    training.initialization.CopyFrom(branch("start", tensor=external("start")))
    return model


def tensors(message) -> list[TensorProto]:
    """Every TensorProto below, by protobuf's own reflection."""
    if isinstance(message, TensorProto):
        return [message]
    found = []
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                found += tensors(child)
    return found


def locations(message) -> set[str]:
    return {entry.value for t in tensors(message) for entry in t.external_data if entry.key == "location"}


@pytest.fixture
def found_in(tmp_path):
    def found(raw: bytes | onnx.ModelProto) -> set[str]:
        path = tmp_path / "model.onnx"
        path.write_bytes(raw if isinstance(raw, bytes) else raw.SerializeToString())
        return external_locations(path)

    return found


def test_the_field_numbers_are_those_of_onnx():
    by_name, todo = {}, [onnx.ModelProto.DESCRIPTOR]
    while todo:
        message = todo.pop()
        if message.name not in by_name:
            by_name[message.name] = message
            todo += [field.message_type for field in message.fields if field.message_type]
    holders, size = {"TensorProto"}, 0
    while size != len(holders):  # messages that hold a holder
        size = len(holders)
        holders |= {
            name
            for name, message in by_name.items()
            if any(field.message_type and field.message_type.name in holders for field in message.fields)
        }
    expected = {
        name: {
            field.number: field.message_type.name
            for field in by_name[name].fields
            if field.message_type and field.message_type.name in holders
        }
        for name in holders
    }
    field = by_name["TensorProto"].fields_by_name["external_data"]
    expected["TensorProto"] = {field.number: field.message_type.name}
    assert expected == external_data._FIELDS
    entry = field.message_type.fields_by_name
    assert (entry["key"].number, entry["value"].number) == (1, 2)


def test_every_place_is_found(found_in):
    model = everywhere()
    expected = locations(model)
    assert len(expected) == 19
    assert found_in(model) == expected


def test_what_onnx_itself_writes(tmp_path):
    arrays = {f"w{i}": np.random.default_rng(i).normal(size=500).astype(np.float32) for i in range(5)}
    model = model_of(*(numpy_helper.from_array(array, name) for name, array in arrays.items()))
    inline = tmp_path / "inline.onnx"
    onnx.save_model(model, inline)
    assert external_locations(inline) == set()
    onnx.save_model(model, tmp_path / "one.onnx", save_as_external_data=True, location="one.data")
    assert external_locations(tmp_path / "one.onnx") == {"one.data"}
    folder = tmp_path / "many"
    folder.mkdir()
    # The first save gave `model` its locations, so this one starts from the file.
    onnx.save_model(onnx.load(inline), folder / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=False)
    assert external_locations(folder / "m.onnx") == set(os.listdir(folder)) - {"m.onnx"} == set(arrays)
    loaded = onnx.load(folder / "m.onnx", load_external_data=False)
    helped = {
        external_data_helper.ExternalDataInfo(tensor).location
        for tensor in external_data_helper._get_all_tensors(loaded)
        if external_data_helper.uses_external_data(tensor)
    }
    assert external_locations(folder / "m.onnx") == helped
    check_external(tmp_path, "many/m.onnx", {f"many/{name}" for name in arrays})


# --- hostile models


@pytest.fixture
def bundle(tmp_path):
    root = tmp_path / "bundle"
    (root / "graphs").mkdir(parents=True)
    (root / "graphs" / "w.data").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(16))
    (root / "graphs" / "out").symlink_to(tmp_path / "secret")
    (root / "graphs" / "up").symlink_to(tmp_path)
    return root


def refused(root, *allowed: str) -> str:
    with pytest.raises(BundleError) as caught:
        check_external(root, "graphs/m.onnx", allowed)
    return str(caught.value)


def test_listed_files_are_allowed(bundle):
    onnx.save_model(model_of(external("w.data"), external("./w.data")), bundle / "graphs" / "m.onnx")
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"])
    check_external(bundle, "graphs//m.onnx", {"graphs/w.data": 1})
    assert "'./w.data', which the manifest does not list" in refused(bundle, "w.data", "graphs/other")


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../x",
        "../graphs/w.data",
        "../../secret",
        "out",
        "up/secret",
        "a\\b",
        "a\0b",
        "",
        ".",
        "..",
    ],
)
@pytest.mark.parametrize("place", ["initializer", "branch", "constant"])
def test_other_files_are_refused(bundle, location, place):
    bad, good = external(location), external("w.data")
    if place == "initializer":
        model = model_of(good, bad)
    elif place == "branch":
        both = {"then_branch": branch("t", tensor=good), "else_branch": branch("f", tensor=bad)}
        model = model_of(good, nodes=[helper.make_node("If", ["c"], ["o"], **both)])
    else:
        model = model_of(good, nodes=[helper.make_node("Constant", [], ["k"], value=bad)])
    (bundle / "graphs" / "m.onnx").write_bytes(model.SerializeToString())
    everything = ["graphs/w.data", "x", "graphs/out", "graphs/up/secret", "secret", "/etc/passwd", location]
    message = refused(bundle, *everything)
    assert message.startswith("'graphs/m.onnx' reads ") and "\n" not in message
    with pytest.raises(BundleError) as caught:  # the same of an engine's form of a graph, wherever that is kept
        check_form(bundle, "graphs/m.onnx", everything, model.SerializeToString())
    assert str(caught.value) == f"the form of {message}"


def test_a_form_reads_what_its_graph_may_read(bundle):
    form = model_of(external("w.data"), external("./w.data")).SerializeToString()
    check_form(bundle, "graphs/m.onnx", ["graphs/w.data"], form)  # m.onnx itself need not be there
    with pytest.raises(BundleError, match=r"the form of 'graphs/m\.onnx' reads '\./w\.data', which the manifest"):
        check_form(bundle, "graphs/m.onnx", ["w.data"], form)
    for raw in (b"", form[:-1]):
        with pytest.raises(BundleError, match=r"the form of graphs/m\.onnx is not an ONNX model: "):
            check_form(bundle, "graphs/m.onnx", ["graphs/w.data"], raw)


def test_onnx_runtimes_marker_for_raw_memory_is_refused(bundle):
    onnx.save_model(model_of(external("*/_ORT_MEM_ADDR_/*")), bundle / "graphs" / "m.onnx")
    assert "which the manifest does not list" in refused(bundle, "graphs/w.data")


def test_a_location_counts_whatever_data_location_says(found_in):
    tensor = external("x")
    tensor.data_location = TensorProto.DEFAULT
    assert found_in(model_of(tensor)) == {"x"}


def test_a_graph_behind_a_link_is_refused(bundle):
    onnx.save_model(model_of(external("w.data")), bundle / "real.onnx")
    (bundle / "graphs" / "m.onnx").symlink_to("../real.onnx")
    assert "behind a symbolic link" in refused(bundle, "graphs/w.data", "w.data")


def test_a_missing_graph(bundle):
    assert "'graphs/m.onnx' cannot be read: No such file" in refused(bundle)


# --- what is kept under the hash


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "turbochain" / "hashes"


@pytest.fixture
def stamped(bundle, cache):
    """The SHA-256 of a sound graph that was checked once."""
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], sha256)
    return sha256


def test_a_graph_is_not_read_again_once_its_hash_is_known(bundle, stamped):
    (bundle / "graphs" / "m.onnx").write_bytes(b"\xff")
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    assert "is not an ONNX model" in refused(bundle, "graphs/w.data")  # nobody vouches for the hash
    with pytest.raises(BundleError, match="is not an ONNX model"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], "0" * 64)


def test_a_known_hash_does_not_excuse_what_is_refused_here(bundle, stamped, tmp_path):
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", ["graphs/other"], stamped)
    (bundle / "graphs" / "w.data").unlink()
    (bundle / "graphs" / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="a symbolic link leads outside"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    (bundle / "graphs" / "m.onnx").rename(bundle / "real.onnx")
    (bundle / "graphs" / "m.onnx").symlink_to("../real.onnx")
    with pytest.raises(BundleError, match="behind a symbolic link"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no checksum": lambda text: text.splitlines()[0] + "\n",
    "no location": lambda text: text.replace('"w.data"', ""),
    "another location": lambda text: text.replace("w.data", "v.data"),
    "another version": lambda text: text.replace("[1,", "[0,"),
    "not JSON": lambda text: "{" * 100_000,
    "another shape": lambda text: "7\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stamp_is_not_used(bundle, cache, stamped, damage):
    (stamp,) = cache.iterdir()
    sound = stamp.read_text()
    stamp.write_text(DAMAGES[damage](sound))
    assert stamp.read_text() != sound
    path = bundle / "graphs" / "m.onnx"
    graph = path.read_bytes()
    path.write_bytes(b"\xff")
    with pytest.raises(BundleError, match="is not an ONNX model"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data", "graphs/v.data"], stamped)
    path.write_bytes(graph)
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], stamped)
    assert stamp.read_text() == sound


def test_the_stamp_of_another_graph_is_not_used(bundle, cache, stamped):
    (stamp,) = cache.iterdir()
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("secret")), path)
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    stamp.rename(stamp.with_name(stamp.name.replace(stamped, other)))
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], other)


def test_only_a_sound_graph_with_that_hash_is_stamped(bundle, cache):
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"])
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], "0" * 64)  # as if it changed after it was verified
    with pytest.raises(BundleError):
        check_external(bundle, "graphs/m.onnx", [], hashlib.sha256(path.read_bytes()).hexdigest())
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_not_used(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = bundle / "graphs" / "m.onnx"
    onnx.save_model(model_of(external("w.data")), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_external(bundle, "graphs/m.onnx", ["graphs/w.data"], digest)
    with pytest.raises(BundleError, match="which the manifest does not list"):
        check_external(bundle, "graphs/m.onnx", [], digest)
    assert (tmp_path / "file").read_text() == ""


def test_an_opened_bundle_uses_the_stamps_unless_full(opened, cache):
    opened.check_files(full=True)
    assert not list(cache.glob("*.external"))
    opened.check_files()
    expected = {
        hashlib.sha256((opened.path / g.file).read_bytes()).hexdigest() for g in opened.manifest.graphs.values()
    }
    assert {stamp.stem for stamp in cache.glob("*.external")} == expected


# --- malformed bytes


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
