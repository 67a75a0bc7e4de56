"""Write LoRA files for a miniature: the same adapter under every naming scheme that programs use."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAMINGS = ("kohya", "peft", "diffusers", "diffusers-old")
LDM = "kohya-ldm"  # kohya's names of SDXL's UNet

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

# The blocks of sdxl-turbo-mini's UNet (one ResNet block to a layer) in Stability AI's code.
LDM_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
LDM_LAYERS = {
    ".conv1": ".in_layers.2",
    ".conv2": ".out_layers.3",
    ".time_emb_proj": ".emb_layers.1",
    ".conv_shortcut": ".skip_connection",
}
OLD_UNET = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}
OLD_TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}


@dataclass(frozen=True)
class Layer:
    """What a LoRA adds to one layer: alpha / rank · up · down."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


Layers = Mapping[tuple[str, str], Layer]
"""(component, module as its checkpoint names it) → what is added."""


def shapes(checkpoint: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component → parameter → shape, of a checkpoint's UNet and text encoders."""
    found = {}
    for component in (c for c in KOHYA if (checkpoint / c).is_dir()):
        (path,) = (checkpoint / component).glob("*.safetensors")
        with safe_open(path, "numpy") as file:
            found[component] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def draw(
    checkpoint: Path,
    *,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float, ...] = (2.0,),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    only: str = "",
) -> dict[tuple[str, str], Layer]:
    """A random adapter of every matrix and convolution (but embeddings), whose ranks and alphas take turns.

    `only`: a part of the names of those that it changes.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[tuple[str, str], Layer] = {}
    for component, parameters in shapes(checkpoint).items():
        for name, shape in parameters.items():
            module = name.removesuffix(".weight")
            if len(shape) < 2 or "embeddings" in name or only not in f"{component}.{name}":
                continue
            rank, alpha = ranks[len(layers) % len(ranks)], alphas[len(layers) % len(alphas)]
            down = torch.randn((rank, *shape[1:]), generator=generator)
            up = torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=generator) * 0.05
            layers[component, module] = Layer(down.to(dtype), up.to(dtype), alpha)
    return layers


def write(path: Path, layers: Layers, naming: str, metadata: dict[str, str] | None = None) -> Path:
    """Write an adapter; where a naming has no alpha, it is multiplied into `up`."""
    save_file(dict(tensors(layers, naming)), path, metadata)
    return path


def tensors(layers: Layers, naming: str) -> Iterator[tuple[str, torch.Tensor]]:
    for (component, module), layer in layers.items():
        if naming in ("kohya", LDM):
            name = _ldm(module) if naming == LDM and component == "unet" else module
            full = KOHYA[component] + name.replace(".", "_")
            yield f"{full}.lora_down.weight", layer.down
            yield f"{full}.lora_up.weight", layer.up
            yield f"{full}.alpha", torch.tensor(layer.alpha)
        else:
            down, up = _NAMES[naming](component, module)
            yield f"{component}.{down}.weight", layer.down
            yield f"{component}.{up}.weight", layer.up * layer.scale


def _ldm(module: str) -> str:
    block = next(b for b in LDM_BLOCKS if module == b or module.startswith(f"{b}."))
    inside = module.removeprefix(block)
    return LDM_BLOCKS[block] + LDM_LAYERS.get(inside, inside)


def _peft(component: str, module: str) -> tuple[str, str]:
    return f"{module}.lora_A", f"{module}.lora_B"


def _diffusers(component: str, module: str) -> tuple[str, str]:
    middle = "lora" if component == "unet" or "text_projection" in module else "lora_linear_layer"
    return f"{module}.{middle}.down", f"{module}.{middle}.up"


def _diffusers_old(component: str, module: str) -> tuple[str, str]:
    old = OLD_UNET if component == "unet" else OLD_TEXT
    end = next((end for end in old if module.endswith(f".{end}")), None)
    if end is None:
        return _diffusers(component, module)
    processor = "processor." if component == "unet" else ""
    name = module.removesuffix(end) + processor + old[end]
    return f"{name}.down", f"{name}.up"


_NAMES = {"peft": _peft, "diffusers": _diffusers, "diffusers-old": _diffusers_old}
