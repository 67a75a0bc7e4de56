"""Every file that a graph would open is found, and one that the bundle does not list is refused."""

import os
from functools import partial

import numpy as np
import onnx
import pytest
from external_models import branch, everywhere, external, found_in_folder, locations, model_of, refused, write_bundle
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from turbochain.runtime.bundle import external_data
from turbochain.runtime.bundle.external_data import check_external, check_form, external_locations
from turbochain.runtime.errors import BundleError


@pytest.fixture
def found_in(tmp_path):
    return partial(found_in_folder, tmp_path)


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


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path)


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
