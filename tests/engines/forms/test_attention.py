"""Attention as one node of ONNX Runtime's own: what it computes, and where it is left as it was."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from turbochain.engines.forms import form
from turbochain.engines.forms.attention import DOMAIN, fuse_attention
from turbochain.runtime import Bundle

B, S, L, HEADS = 2, 9, 5, 3


def graph(path: Path, size: int, *, mask: bool = False, shuffled: bool = False, kind: int = TensorProto.FLOAT) -> Path:
    """Write an attention as the exporter does; `shuffled`: with the axes of the heads and of their values exchanged."""
    wide, order = HEADS * size, [0, 3, 1, 2] if shuffled else [0, 2, 1, 3]
    heads = [[B, n, size, HEADS] if shuffled else [B, n, HEADS, size] for n in (S, L, L)]
    constants = {f"{x}_heads": np.array(sizes, np.int64) for x, sizes in zip("qkv", heads, strict=True)}
    constants |= {"k_flat": np.array([B * HEADS, L, size]), "k_back": np.array([B, HEADS, size, L])}
    constants |= {"joined": np.array([B, S, wide])}
    constants |= {"root": np.array([size**-0.25], helper.tensor_dtype_to_np_dtype(kind))}
    constants |= {"mask": np.linspace(-1, 1, S * L, dtype=np.float32).reshape(S, L)} if mask else {}
    node = helper.make_node
    nodes = [node("Reshape", [x, f"{x}_heads"], [f"{x}1"]) for x in "qkv"]
    nodes += [node("Transpose", [f"{x}1"], [f"{x}2"], perm=[0, 3, 1, 2] if shuffled else order) for x in "qkv"]
    nodes += [
        node("Mul", ["q2", "root"], ["q3"]),
        node("Reshape", ["k2", "k_flat"], ["k3"]),
        node("Transpose", ["k3"], ["k4"], perm=[0, 2, 1]),
        node("Reshape", ["k4", "k_back"], ["k5"]),
        node("Mul", ["k5", "root"], ["k6"]),
        node("MatMul", ["q3", "k6"], ["scores"]),
        *([node("Add", ["scores", "mask"], ["masked"])] if mask else []),
        node("Softmax", ["masked" if mask else "scores"], ["shares"], axis=-1),
        node("MatMul", ["shares", "v2"], ["made"]),
        node("Transpose", ["made"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "joined"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(x, kind, [B, n, wide]) for x, n in zip("qkvy", (S, L, L, S), strict=True)]
    made = helper.make_graph(
        nodes, "g", ends[:3], ends[3:], [numpy_helper.from_array(v, name) for name, v in constants.items()]
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(model: bytes | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    given = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def kinds(model: bytes | Path) -> Counter[str]:
    loaded = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    return Counter(node.op_type for node in loaded.graph.node)


def test_it_is_pytorchs_attention(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    feeds = {x: draw.standard_normal((B, n, 8 * HEADS), np.float32) for x, n in zip("qkv", (S, L, L), strict=True)}
    made = form(graph(tmp_path / "g.onnx", 8), [fuse_attention])
    assert kinds(made) == {"MultiHeadAttention": 1}
    heads = [torch.from_numpy(x).double().unflatten(2, (HEADS, 8)).transpose(1, 2) for x in feeds.values()]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(run(made, feeds)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (8, {"mask": True}),  # as a text encoder's
        (8, {"shuffled": True}),  # which is no attention over heads that lie side by side
        (256, {}),
        (512, {"kind": TensorProto.FLOAT16}),  # a VAE's single head: 16 of its keys and values are 32 KiB in fp16
    ],
)
def test_what_stays(tmp_path: Path, size: int, how: dict[str, int]) -> None:
    path = graph(tmp_path / "g.onnx", size, **how)  # type: ignore[arg-type]
    assert kinds(form(path, [fuse_attention])) == kinds(path)


def test_the_largest_heads_of_unets_are_fused(tmp_path: Path) -> None:
    for size in (40, 64, 80, 160):  # SD 1.5's and SD 2.1's
        assert kinds(form(graph(tmp_path / "g.onnx", size), [fuse_attention])) == {"MultiHeadAttention": 1}


@pytest.mark.parametrize(("bundle", "feature"), [("sdxl", None), ("slotted", "lora"), ("controlled", "control")])
def test_every_attention_of_unets_and_vaes(
    bundle: str, feature: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each computes what it did: SDXL's for three pictures, and SD's with slots and with what a ControlNet makes."""
    path = request.getfixturevalue(bundle)
    opened, draw = Bundle.open(path), np.random.default_rng(0)
    graphs = {n: g for n, g in opened.manifest.graphs.items() if feature is None or feature in g.features}
    assert any(graph.component == "unet" for graph in graphs.values())
    for name, graph in graphs.items():
        before, made = kinds(path / graph.file), form(path / graph.file, [fuse_attention])
        opened.check_form(name, made)  # it reads the graph's own data and no other
        after = kinds(made)
        fused = 0 if graph.component.startswith("text") else before["Softmax"]
        assert (after["MultiHeadAttention"], after["Softmax"]) == (fused, before["Softmax"] - fused), name
        if graph.component == "unet":
            assert fused >= 8, name
        if not fused:
            assert after == before
            continue
        feeds = {
            t.name: draw.integers(0, 256, t.shape, t.dtype)
            if t.dtype == "uint8"
            else (0.1 if "lora" in t.name else 1) * draw.standard_normal(t.shape, np.float32)
            for t in graph.inputs
        }
        feeds = {
            feed: value.astype(np.uint8 if value.dtype == np.uint8 else np.float32) for feed, value in feeds.items()
        }
        (tmp_path / "form.onnx").write_bytes(made)
        for file in graph.data:
            (tmp_path / Path(file).name).unlink(missing_ok=True)
            (tmp_path / Path(file).name).hardlink_to(path / file)
        for expected, found in zip(run(path / graph.file, feeds), run(tmp_path / "form.onnx", feeds), strict=True):
            if expected.dtype == np.uint8:
                assert np.abs(expected.astype(int) - found).max() <= 1
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    assert DOMAIN in {entry.domain for entry in onnx.load_from_string(made).opset_import} or not fused
