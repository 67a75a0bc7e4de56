"""The merge of the runtime, which numpy computes, beside that of peft, which diffusers' `fuse_lora` calls."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from turbochain.runtime.inputs.adapters import LowRank
from turbochain.runtime.patches import merge

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(320, 640, bias=False),
    "1x1": lambda: nn.Conv2d(320, 640, 1, bias=False),
    "3x3": lambda: nn.Conv2d(64, 128, 3, bias=False),
}
ALPHA, WEIGHTS = 3.0, {"a": 0.7, "b": -0.4}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # the first adapter's
@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_merged_weight_is_that_of_peft(kind: str, rank: int) -> None:
    """Of two adapters, one after the other: the same bits, or, if the libraries add up in orders of their own, as near
    as two sums in fp32 must be. (On an AMD EPYC all of these are the same bits.)"""
    torch.manual_seed(rank)
    module = nn.ModuleDict({"layer": LAYERS[kind]()})
    before = module["layer"].weight.detach().numpy().copy()
    for name in WEIGHTS:
        config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=False)
        inject_adapter_in_model(config, module, adapter_name=name)
    layer, changes = module["layer"], []
    for name, weight in WEIGHTS.items():
        layer.set_scale(name, weight)
        down, up = (of[name].weight.detach().numpy() for of in (layer.lora_A, layer.lora_B))
        changes.append((LowRank(down, up, ALPHA / rank), weight))
    layer.merge(adapter_names=[*WEIGHTS])
    theirs, ours = layer.base_layer.weight.detach().numpy(), merge(before, changes)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape and (ours != before).mean() > 0.99
    if rank == 1:
        np.testing.assert_array_equal(ours, theirs)
    size = sum(
        abs(one.scale * weight) * (np.abs(one.up).reshape(len(one.up), -1) @ np.abs(one.down).reshape(rank, -1))
        for one, weight in changes
    )
    unit = 2.0**-24  # the largest relative error of one operation, of which a value of the product takes `rank` and two
    bound = 2 * unit * ((rank + 2) * size + len(changes) * np.abs(theirs).max())  # both libraries are off
    assert (np.abs(ours - theirs).reshape(size.shape) <= bound).all()
