"""What is changed in a graph before OpenVINO compiles it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import FAMILIES, BundleFactory
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from turbochain.runtime.backends import openvino as backend
from turbochain.runtime.backends import openvino_int8, openvino_model
from turbochain.runtime.bundle.quantization import Layer, Range, Rounding

openvino = backend.library()
ops = openvino.opset13
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_norm_becomes_one_operation(
    family: str, bundle_of: BundleFactory, checkpoints: dict[str, Path]
) -> None:
    bundle = bundle_of(family)
    for graph, kind, folder in (("unet", UNet2DConditionModel, "unet"), ("vae_decoder", AutoencoderKL, "vae")):
        network = kind.from_pretrained(checkpoints[family] / folder)
        network = getattr(network, "decoder", network)
        expected = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
        model = openvino.Core().read_model(bundle / f"graphs/{graph}.onnx")
        assert openvino_model.fuse_group_norms(model) == expected > 10
        assert openvino_model.fuse_group_norms(model) == 0
        shapes = group_norm_shapes(model)
        few = [shape for shape in shapes if len(shape) != 4 or shape[2] < 32]  # the attention's, and small ones
        assert openvino_model.split_group_norms(model) == len(shapes) - len(few)
        assert group_norm_shapes(model) == few
        assert (len(few) < len(shapes)) == (graph == "vae_decoder")  # the UNet's of the miniature are all small


def group_norm_shapes(model: Any) -> list[list[int]]:
    """Of what each reads."""
    norms = (op for op in model.get_ordered_ops() if op.get_type_name() == "GroupNormalization")
    return [list(op.input_value(0).get_shape()) for op in norms]


def kinds(model: Any) -> Counter[str]:
    return Counter(op.get_type_name() for op in model.get_ops())


def exported(module: nn.Module, given: torch.Tensor, path: Path) -> Any:
    torch.onnx.export(module.eval(), (given,), path, dynamo=True, verbose=False)
    return openvino.Core().read_model(path)


def made(model: Any, given: torch.Tensor, precision: str = "f32") -> np.ndarray:
    model.validate_nodes_and_infer_types()
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return np.array(compiled(given.numpy())[0])


@pytest.mark.parametrize(("mean", "bound"), [(0, 1e-6), (10, 1e-5)])
def test_a_split_group_norm_is_pytorchs(mean: float, bound: float) -> None:
    """Also where the values of a group lie many standard deviations from zero, and in a batch."""
    random = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 24, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=random)
    means = mean * torch.randn((2, 4, 1, 1), generator=random).repeat_interleave(6, 1)
    given = torch.randn((2, 24, 32, 48), generator=random) + means
    x = ops.parameter(list(given.shape), np.float32)
    weight, bias = (parameter.detach().numpy() for parameter in norm.parameters())
    y = ops.group_normalization(x, weight, bias, 4, 1e-6)
    model = openvino.Model([y.output(0)], [x])
    assert openvino_model.split_group_norms(model) == 1 and not kinds(model)["GroupNormalization"]
    expected = norm.double()(given.double()).detach().numpy()
    error = np.abs(made(model, given) - expected).max() / np.abs(expected).max()
    assert error < bound
    if HAS_BF16:  # of values that bf16 holds
        coarse = given.bfloat16().float()
        expected = norm(coarse.double()).detach().numpy()
        off = made(model, coarse, "bf16") - expected
        assert np.linalg.norm(off) / np.linalg.norm(expected) < (0.02 if mean else 0.004)


class Upsampled(nn.Module):
    def __init__(
        self, channels: int = 4, kernel: int = 3, scale: float = 2, mode: str = "nearest", **more: Any
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels + 1, kernel, padding=kernel // 2, **more)
        self.how = {"scale_factor": float(scale), "mode": mode}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(nn.functional.interpolate(x, **self.how))


@pytest.mark.parametrize(
    ("changes", "merged"),
    [
        ({}, 1),
        ({"channels": 64}, 0),  # more weights than results
        ({"kernel": 1}, 0),
        ({"kernel": 5}, 0),
        ({"scale": 3}, 0),
        ({"mode": "bilinear"}, 0),
        ({"stride": 2}, 0),
        ({"groups": 1, "dilation": 2}, 0),
    ],
)
def test_upsampling_and_its_convolution_are_one(changes: dict[str, Any], merged: int, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    module = Upsampled(**changes)
    given = torch.randn((2, changes.get("channels", 4), 9, 7), generator=random)
    model = exported(module, given, tmp_path / "x.onnx")
    assert openvino_model.merge_upsampling(model) == merged
    assert kinds(model)["ConvolutionBackpropData"] == merged
    np.testing.assert_allclose(made(model, given), module(given).detach().numpy(), atol=1e-5)


def test_other_square_roots_are_left_alone(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    nodes = [onnx.helper.make_node("Sqrt", ["x"], ["r"]), onnx.helper.make_node("Mul", ["r", "x"], ["y"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y]), ir_version=10)
    onnx.save(model, tmp_path / "x.onnx")
    read = openvino.Core().read_model(tmp_path / "x.onnx")
    openvino_model.prepare(read)
    given = np.float32([1, 4, 9, 16])
    np.testing.assert_allclose(openvino.compile_model(read, "CPU")(given)[0], given**1.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_sums_of_bytes_do_not_overflow(kind: str) -> None:
    """The largest input times the largest weight, 288 times: two such products exceed 16 bits."""
    if kind == "linear":
        given = torch.ones(1, 32, 288)
        weight = ops.constant(np.ones((288, 16), np.float32))
        read = ops.parameter(list(given.shape), np.float32)
        product = ops.matmul(read, weight, False, False)
    else:
        given = torch.ones(1, 32, 16, 16)
        weight = ops.constant(np.ones((16, 32, 3, 3), np.float32))
        read = ops.parameter(list(given.shape), np.float32)
        product = ops.convolution(read, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    product.set_friendly_name("product")
    model = openvino.Model([product.output(0)], [read])
    rounding = Rounding(Range(-0.5, 1.0), 0.0)
    kept = {"product": Layer(rounding, 0.0, rounding, 1)}
    assert openvino_int8.quantize(model, kept, openvino_int8.weight_bits()) == 1
    np.testing.assert_allclose(made(model, given), 288, rtol=0.02)
