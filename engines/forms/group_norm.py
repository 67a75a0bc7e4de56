"""GroupNormalization for ONNX Runtime's CUDA provider, which has no kernel for it.

ONNX Runtime would put the operator's definition in its place, which computes shapes on the CPU.
"""

from typing import Any

import numpy as np

from turbochain.engines.forms.network import Network, attributes


def by_instance(network: Network) -> None:
    """Compute each GroupNormalization as an InstanceNormalization with a group for a channel, its shapes constant."""
    network.replace("GroupNormalization", lambda node: _by_instance(network, node))


def _by_instance(network: Network, node: Any) -> list[Any]:
    from onnx import TensorProto, helper

    x, weight, bias = node.input
    made, given = node.output[0], attributes(node)
    groups, shape, dtype = given["num_groups"], network.shape(x), network.dtype(x)
    per_channel = (shape[1], *(1,) * (len(shape) - 2))
    computed = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype  # there is no InstanceNormalization of it
    kind = helper.tensor_dtype_to_np_dtype(computed)
    ones = network.constant(f"{groups} ones of {kind}", np.ones(groups, kind))
    zeros = network.constant(f"{groups} zeros of {kind}", np.zeros(groups, kind))
    grouped = network.constant("x".join(map(str, (shape[0], groups, -1))), np.array([shape[0], groups, -1], np.int64))
    whole = network.constant("x".join(map(str, shape)), np.array(shape, np.int64))
    names = [f"{made}/{step}" for step in ("grouped", "read", "normalised", "rounded", "whole", "scaled")]
    a, b, c, d, e, f = names
    cast = computed != dtype
    return [
        helper.make_node("Reshape", [x, grouped], [a], f"{made}/reshape"),
        *([helper.make_node("Cast", [a], [b], f"{made}/widen", to=computed)] if cast else []),
        helper.make_node(
            "InstanceNormalization", [b if cast else a, ones, zeros], [c], f"{made}/norm", epsilon=given["epsilon"]
        ),
        *([helper.make_node("Cast", [c], [d], f"{made}/narrow", to=dtype)] if cast else []),
        helper.make_node("Reshape", [d if cast else c, whole], [e], f"{made}/back"),
        helper.make_node("Mul", [e, network.reshaped(weight, per_channel)], [f], f"{made}/scale"),
        helper.make_node("Add", [f, network.reshaped(bias, per_channel)], [made], node.name),
    ]
