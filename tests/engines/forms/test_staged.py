"""Operators that the CUDA provider stages through the host are written in others: equal bits on the CPU provider."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from turbochain.engines.forms import Rewrite, form
from turbochain.engines.forms.staged import MOST, cut_concats, gather_rows

ROWS = """
<ir_version: 10, opset_import: ["" : 21]>
g ({kind}[{batch}, 7, 5] x, int64[{batch}, 1] last) => ({kind}[{batch}, 5] y)
<int64[{batch}, 1] first = {{{rows}}}>
{{
    pairs = Concat <axis = -1> (first, last)
    y = GatherND <batch_dims = 0> (x, pairs)
}}
"""
JOINED = """
<ir_version: 10, opset_import: ["" : 21]>
g ({kind}[2, {a}, 3] a, {kind}[2, {b}, 3] b, {kind}[2, {b}, 3] c) => ({kind}[2, {all}, 3] y, {kind}[4, {b}, 3] z)
{{
    y = Concat <axis = {axis}> (a, b)
    z = Concat <axis = 0> (b, c)
}}
"""
DTYPES = {"double": np.float64, "float": np.float32, "float16": np.float16}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made: list[np.ndarray] = session.run(None, feeds)
    return made


def both(text: str, rewrite: Rewrite, feeds: dict[str, np.ndarray], folder: Path) -> Counter[str]:
    """Assert that the rewritten graph gives the same bits; how often it has each operator."""
    old = parser.parse_model(text)
    onnx.save(old, folder / "g.onnx")
    new = onnx.load_from_string(form(folder / "g.onnx", [rewrite]))
    onnx.checker.check_model(new, full_check=True)
    for expected, made in zip(run(old, feeds), run(new, feeds), strict=True):
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made, expected)
    return Counter(node.op_type for node in new.graph.node)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_of_each_text(kind: str, batch: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(batch)
    last = np.array([[6], [0], [3]])[:batch]
    feeds = {"x": draw.normal(size=(batch, 7, 5)).astype(DTYPES[kind]), "last": last}
    text = ROWS.format(kind=kind, batch=batch, rows=", ".join(map(str, range(batch))))
    found = both(text, gather_rows, feeds, tmp_path)
    assert found["Gather"] == 1 and not found["GatherND"] and not found["Concat"]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("a", "b", "axis", "pieces"), [(4, 2, 1, 3), (6, 9, -2, 5), (4, 4, 1, 2), (MOST, 1, 1, 2)])
def test_parts_of_one_size(kind: str, a: int, b: int, axis: int, pieces: int, tmp_path: Path) -> None:
    """Equal parts stay as they are, and so do those that would need too many pieces."""
    draw = np.random.default_rng(0)
    sizes = {"a": a, "b": b, "c": b}
    feeds = {name: draw.normal(size=(2, size, 3)).astype(DTYPES[kind]) for name, size in sizes.items()}
    found = both(JOINED.format(kind=kind, a=a, b=b, all=a + b, axis=axis), cut_concats, feeds, tmp_path)
    cut = {"a": a, "b": b} if pieces > 2 else {}
    assert found["Concat"] == 2 and found["Split"] == sum(size * pieces // (a + b) > 1 for size in cut.values())
