"""GroupNormalization in operators that ONNX Runtime's CUDA provider has kernels for.

It has none for the operator itself. ONNX Runtime puts the operator's definition in its place, which computes shapes on
the CPU.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from turbochain.engines.forms.network import Network, Step, attributes, chain


def by_instance(network: Network) -> None:
    """Compute each GroupNormalization as an InstanceNormalization of groups in place of channels, its shapes constant.

    In fp16 the normalised values are rounded once more, before they are scaled.
    """
    network.replace("GroupNormalization", lambda node: _by_instance(network, node))


def _by_instance(network: Network, node: Any) -> Iterable[Any]:
    x, weight, bias = node.input
    groups, shape, dtype = attributes(node)["num_groups"], network.shape(x), network.dtype(x)
    per_channel = (shape[1], *(1,) * (len(shape) - 2))
    computed = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype  # of bf16 there is no such kernel
    kind = helper.tensor_dtype_to_np_dtype(computed)
    normalise = Step(
        "InstanceNormalization",
        network.constant(f"ones_{groups}_{kind}", np.ones(groups, kind)),
        network.constant(f"zeros_{groups}_{kind}", np.zeros(groups, kind)),
        epsilon=attributes(node)["epsilon"],
    )
    steps = (
        Step("Reshape", network.sizes(shape[0], groups, -1)),
        *([normalise] if computed == dtype else [Step("Cast", to=computed), normalise, Step("Cast", to=dtype)]),
        Step("Reshape", network.sizes(*shape)),
        Step("Mul", network.reshaped(weight, per_channel)),
        Step("Add", network.reshaped(bias, per_channel)),
    )
    return chain(x, steps, node.output[0])
