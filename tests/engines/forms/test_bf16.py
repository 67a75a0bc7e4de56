"""A Resize of bf16 is computed in fp32, exactly, and no other node is changed."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from turbochain.engines.forms import form
from turbochain.engines.forms.bf16 import widen


@pytest.mark.parametrize(("dtype", "casts"), [(ml_dtypes.bfloat16, 2), (np.float16, 0)])
def test_nearest_neighbours_are_copied(tmp_path: Path, dtype: type, casts: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype(dtype)
    kind, large = helper.np_dtype_to_tensor_dtype(x.dtype), (1, 3, 8, 10)
    ends = [helper.make_tensor_value_info("x", kind, x.shape), helper.make_tensor_value_info("y", kind, large)]
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "scales"], ["y"], **how)], "g", ends[:1], ends[1:], [scales]
    )
    opset = helper.make_opsetid("", 22)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "g.onnx")
    model = onnx.load_from_string(form(tmp_path / "g.onnx", [widen]))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("Cast") == casts
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x.repeat(2, 2).repeat(2, 3))
