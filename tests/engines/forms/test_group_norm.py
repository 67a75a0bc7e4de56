"""GroupNormalization written in other operators, against PyTorch's."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from turbochain.engines.forms import form
from turbochain.engines.forms.group_norm import INSTANCE_OPSET, expand_group_norms

EPS = 2**-10  # large enough to show, and a number in fp32


def graph(path: Path, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int, opset: int) -> Path:
    """Write a graph of two norms in a row, with weight and bias beside it."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    ends = [helper.make_tensor_value_info(name, kind, x.shape) for name in ("x", "y")]
    nodes = [
        helper.make_node("GroupNormalization", [read, "w", "b"], [made], num_groups=groups, epsilon=EPS)
        for read, made in (("x", "between"), ("between", "y"))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in (("w", weight), ("b", bias))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    onnx.save_model(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (1, 6, 11), (3, 4, 2, 3, 2)])
@pytest.mark.parametrize(
    ("opset", "dtype", "error"),
    [
        (INSTANCE_OPSET, np.float64, 1e-12),
        (INSTANCE_OPSET, np.float32, 2e-6),
        (INSTANCE_OPSET, np.float16, 2e-3),
        (INSTANCE_OPSET + 1, np.float32, 2e-6),
        (INSTANCE_OPSET + 1, np.float16, 2e-3),
        (INSTANCE_OPSET + 1, ml_dtypes.bfloat16, 2e-2),
    ],
)
def test_it_normalises_as_pytorch_does(
    tmp_path: Path, shape: tuple[int, ...], opset: int, dtype: type, error: float
) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(size).astype(dtype) for size in (shape, shape[1], shape[1]))
    made = form(graph(tmp_path / "g.onnx", 3 + 2 * x, weight, bias, 2, opset), [expand_group_norms])
    (tmp_path / "form.onnx").write_bytes(made)
    onnx.checker.check_model(tmp_path / "form.onnx", full_check=True)
    model = onnx.load(tmp_path / "form.onnx")
    (found,) = ReferenceEvaluator(model).run(None, {"x": 3 + 2 * x})

    expected, (w, b) = (
        torch.from_numpy((3 + 2 * x).astype(np.float64)),
        (torch.from_numpy(value.astype(np.float64)) for value in (weight, bias)),
    )
    for _ in range(2):
        expected = torch.nn.functional.group_norm(expected, 2, w, b, EPS)
    assert found.dtype == dtype and found.shape == shape
    np.testing.assert_allclose(
        found.astype(np.float64), expected.numpy(), rtol=0, atol=error * float(expected.abs().max())
    )


def test_the_weights_stay_where_they_are(tmp_path: Path) -> None:
    """The form reads them from the file beside the graph, and has itself no more than constants of a few groups."""
    x, weight = np.ones((1, 4096, 2, 2), np.float32), np.ones(4096, np.float32)
    made = form(graph(tmp_path / "g.onnx", x, weight, weight, 4, INSTANCE_OPSET), [expand_group_norms])
    assert len(made) < 4096
    model = onnx.load_from_string(made)
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert {t.name for t in outside} == {"w", "b"}
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {"weights"}
