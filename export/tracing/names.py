"""Map a component's parameters to the initializers of its graphs."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch


def name_map(
    parameters: Mapping[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype,
    folded: Collection[str] = (),
    factors: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, Any] | None]:
    """Parameter name → the initializer that holds it; None where this graph has no use for it.

    Of the parameters in `folded` the graph holds what was computed of them: {"folded": true}. `factors`: parameter →
    what the checkpoint's value was multiplied by (`rescale`); the entry says so as "factor".

    The exporter renames what it folds, so values decide: an initializer holds a parameter when it has the same values
    (in `dtype`) in the same order; its shape may differ by sizes of 1 or by groups. Where several parameters have equal
    values, the exporter's own name decides.
    """
    holders: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    sizes = set()
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        holders[_fingerprint(array)].append(tensor.name)
        sizes.add(array.size)
    mapped: dict[str, dict[str, Any] | None] = {}
    for name, parameter in parameters.items():
        mapped[name] = {"folded": True} if name in folded else None
        if name in folded or parameter.numel() not in sizes:
            continue
        found = holders.get(_fingerprint(_numpy(parameter.detach().to(dtype))), [])
        own = [h for h in found if h.endswith(f".{name}")]
        if found:
            factor = {"factor": factors[name]} if name in factors else {}
            mapped[name] = {"initializer": (own or found)[0], **factor}
    return mapped


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """As onnx gives an initializer: bfloat16, which numpy lacks, as the type of ml_dtypes."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))


def _fingerprint(array: np.ndarray) -> tuple[Any, ...]:
    return array.size, str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()
