"""The form of a graph that TensorRT gets computes the same as the bundle's, in fp64, as ONNX's own evaluator says."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import HALF, BundleFactory
from fp64 import in_fp64
from onnx import TensorProto, parser
from onnx.reference import ReferenceEvaluator
from torch.nn import functional

from turbochain.engines.forms.tensorrt import rewrite
from turbochain.runtime import Bundle, TurbochainError
from turbochain.runtime.backends.upsampling import transposed_kernel


def test_the_transposed_kernel_is_doubling_and_convolution() -> None:
    draw = np.random.default_rng(0)
    for channels, others, height, width in ((1, 1, 1, 1), (3, 5, 4, 7), (8, 2, 9, 2)):
        image, weight = draw.normal(size=(2, channels, height, width)), draw.normal(size=(others, channels, 3, 3))
        doubled = functional.interpolate(torch.tensor(image), scale_factor=2, mode="nearest")
        expected = functional.conv2d(doubled, torch.tensor(weight), padding=1)
        assert transposed_kernel(weight).flags.c_contiguous  # libraries copy it as it lies in memory
        kernel = torch.tensor(transposed_kernel(weight))
        made = functional.conv_transpose2d(torch.tensor(image), kernel, stride=2, padding=1)
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-13)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("family", HALF)
def test_every_graph_computes_the_same(family: str, bundle_of: BundleFactory, tmp_path: Path) -> None:
    bundle, draw = Bundle.open(bundle_of(family, "fp16")), np.random.default_rng(0)
    changes = {}
    for name, graph in bundle.manifest.graphs.items():
        old, wide = in_fp64(bundle.path / graph.file), tmp_path / f"{name}.onnx"
        onnx.save(old, wide)
        new = onnx.load_from_string(rewrite(wide))
        feeds = {
            t.name: draw.integers(0, 1000, t.shape, t.dtype) if t.dtype == "int32" else draw.normal(size=t.shape)
            for t in graph.inputs
        }
        for expected, made in zip(*(ReferenceEvaluator(m).run(None, feeds) for m in (old, new)), strict=True):
            assert expected.dtype == np.float64
            np.testing.assert_allclose(made, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
        changes[name] = {k: (kinds(old)[k], kinds(new)[k]) for k in ("Resize", "ConvTranspose", "MatMul", "Softmax")}
    for name, change in changes.items():
        products, attentions = change["MatMul"], change["Softmax"][0]
        merged = 2 * attentions if name.startswith("text") else 0  # the UNet's have no bias, the VAE's one head
        assert products[0] - products[1] == merged, name
        doublings = {"unet": 1, "vae_decoder": 3}.get(name, 0)
        assert (change["Resize"], change["ConvTranspose"]) == ((doublings, 0), (0, doublings)), name
        assert change["Softmax"][0] == change["Softmax"][1]


def test_the_norm_of_the_attention_reads_pictures(sd_fp16: Bundle) -> None:
    def reads_flattened(model: onnx.ModelProto) -> int:
        made_by = {output: node.op_type for node in model.graph.node for output in node.output}
        norms = [node for node in model.graph.node if node.op_type == "GroupNormalization"]
        return sum(made_by.get(norm.input[0]) == "Reshape" for norm in norms)

    for name in ("vae_decoder", "vae_encoder"):
        path = sd_fp16.path / f"graphs/{name}.onnx"
        assert reads_flattened(onnx.load(path, load_external_data=False)) == 1
        assert reads_flattened(onnx.load_from_string(rewrite(path))) == 0


@pytest.fixture
def sd_fp16(bundle_of: BundleFactory) -> Bundle:
    return Bundle.open(bundle_of("sd", "fp16"))


def test_weights_stay_in_their_files_but_new_ones(sd_fp16: Bundle) -> None:
    def inside(model: onnx.ModelProto) -> set[str]:
        return {t.name for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL}

    for name, merged in (("text_encoder", 0), ("unet", 1), ("vae_decoder", 3)):
        path = sd_fp16.path / sd_fp16.manifest.graphs[name].file
        new = inside(onnx.load_from_string(rewrite(path))) - inside(onnx.load(path, load_external_data=False))
        assert len(new) == merged and all(t.endswith(".transposed") for t in new)


def test_weights_may_have_several_names(sd_fp16: Bundle, tmp_path: Path) -> None:
    """As those of a bundle in the hub's cache have, which onnx_ir by itself refuses to read."""
    graph = sd_fp16.manifest.graphs["vae_decoder"]
    for name in (graph.file, *graph.data):
        shutil.copy(sd_fp16.path / name, tmp_path)
    for name in graph.data:
        os.link(tmp_path / Path(name).name, tmp_path / f"{Path(name).name}.second")
    assert rewrite(tmp_path / Path(graph.file).name) == rewrite(sd_fp16.path / graph.file)


LEFT_ALONE = {
    "linear": ('mode = "linear"', "pads = [1, 1, 1, 1]", "2.0, 2.0"),
    "by three": ('mode = "nearest"', "pads = [1, 1, 1, 1]", "3.0, 3.0"),
    "one way": ('mode = "nearest"', "pads = [1, 1, 1, 1]", "1.0, 2.0"),
    "other borders": ('mode = "nearest"', "pads = [0, 1, 1, 1]", "2.0, 2.0"),
    "steps of two": ('mode = "nearest"', "pads = [1, 1, 1, 1], strides = [2, 2]", "2.0, 2.0"),
}


@pytest.mark.parametrize("case", [None, *LEFT_ALONE])
def test_what_is_no_plain_doubling_is_left_alone(case: str | None, tmp_path: Path) -> None:
    mode, more, scales = LEFT_ALONE.get(case or "", ('mode = "nearest"', "pads = [1, 1, 1, 1]", "2.0, 2.0"))
    strides = "" if "strides" in more else "strides = [1, 1], "
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 2, 4, 4] x) => (float[1, 3, a, b] y)
        <float[4] scales = {{1.0, 1.0, {scales}}}, float[3, 2, 3, 3] w = {{{", ".join(["0.5"] * 54)}}}> {{
            large = Resize <{mode}, coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , scales)
            y = Conv <group = 1, dilations = [1, 1], auto_pad = "NOTSET", {strides}{more}> (large, w)
        }}"""
    onnx.save(parser.parse_model(text), tmp_path / "x.onnx")
    assert kinds(onnx.load_from_string(rewrite(tmp_path / "x.onnx")))["ConvTranspose"] == (case is None)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(TurbochainError, match=r"x.onnx is not an ONNX graph"):
        rewrite(tmp_path / "x.onnx")
