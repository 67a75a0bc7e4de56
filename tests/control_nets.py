"""Miniature ControlNets and T2I-Adapters with random weights, in the configuration classes of the published ones."""

from pathlib import Path
from typing import Any

import torch
from conftest import ON, SIZE
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from here import build_here

from turbochain.export.sources import synthetic

STRENGTH = 0.5
"""What the last convolutions of a ControlNet are multiplied by: with random weights its residuals are large."""


def controlnet(checkpoint: Path, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a ControlNet for a checkpoint's UNet, as thibaud's for SD 2.1 and diffusers' and xinsir's for SDXL are.

    `changes`: of its config. The published ones begin as copies of the UNet's first half; this one has weights of its
    own, as trained ones do.
    """
    unet = UNet2DConditionModel.load_config(checkpoint, subfolder="unet")
    with torch.device("meta"):
        copied = ControlNetModel.from_unet(UNet2DConditionModel.from_config(unet), load_weights_from_unet=False)
    net = ControlNetModel.from_config({**copied.config, **changes})
    synthetic.draw_weights({"controlnet": net}, torch.Generator().manual_seed(100 + seed))
    with torch.no_grad():
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            convolution.weight.mul_(STRENGTH)
    net.save_pretrained(folder)
    return folder


def small(levels: int) -> dict[str, Any]:
    """The changes that make of a ControlNet one like diffusers/controlnet-canny-sdxl-1.0-small: without attention."""
    return {"down_block_types": ["DownBlock2D"] * levels, "mid_block_type": "UNetMidBlock2D"}


def t2i_adapter(checkpoint: Path, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a T2I-Adapter for a checkpoint's UNet, as TencentARC's are."""
    config = UNet2DConditionModel.load_config(checkpoint, subfolder="unet")
    channels, kind = list(config["block_out_channels"]), "full_adapter"
    given = {"channels": channels, "adapter_type": kind, "downscale_factor": 8, "num_res_blocks": 1, **changes}
    adapter = T2IAdapter(**given)
    synthetic.draw_weights({"adapter": adapter}, torch.Generator().manual_seed(200 + seed))
    adapter.save_pretrained(folder)
    return folder


def build(family: str, checkpoint: Path, folder: Path, **how: Any) -> dict[str, Path]:
    """Build `made.bundle` with a ControlNet, canny, and a T2I-Adapter, sketch, beside what `how` says.

    Return name → folder of each network.
    """
    xl = {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "channels": [32, 64]}
    nets = {
        "canny": controlnet(checkpoint, folder / "canny"),
        "sketch": t2i_adapter(checkpoint, folder / "sketch", **(xl if family == "sdxl" else {})),
    }
    given: dict[str, Any] = {"precision": "fp32", "size": SIZE, "steps": [2], "quiet": True, **ON, **how}
    given["controlnet"] = {"canny": str(nets["canny"]), **given.get("controlnet", {})}
    nets |= {name: Path(place) for name, place in given["controlnet"].items()}
    build_here(str(checkpoint), folder / "made.bundle", t2i_adapter={"sketch": str(nets["sketch"])}, **given)
    return nets
