"""Complete Turbo checkpoints, and their relatives, with random weights, for machines that reach no model hub.

The architectures, configs and file names are the published ones; only the weights are drawn, from a seed, with gains
that keep every activation in half precision's range and make the picture depend on every input. The `-mini` presets
have the same parts at narrow widths and each kind of the UNet's blocks once, small enough for tests.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from turbochain.export.sources import presets
from turbochain.export.sources.presets import Config
from turbochain.export.sources.vocabulary import MAX_TOKENS, VOCABULARY_SIZE, write_tokenizer

# The published settings that both families share.
_UNET: Config = {"sample_size": 64, "use_linear_projection": True}
_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}

# Weights are drawn from N(0, gain²/fan_in), so a gain of 1 keeps the scale of what goes in. The first match
# counts. Branches that are added to a residual stream are drawn smaller, for the stream not to grow with
# depth; what reads the prompt, the pooled embedding and the time larger, for the picture to depend on them.
_GAINS: tuple[tuple[str, float], ...] = (
    (r"token_embedding|position_embedding", 1.0),
    (r"time_embedding\.linear_1", 3.0),
    (r"time_embedding\.cond_proj", 0.4),
    (r"add_embedding\.linear_1|time_emb_proj", 4.0),
    (r"attn2\.to_v", 4.0),
    (r"attn2\.to_out", 1.0),
    (r"attn\d\.to_out|ff\.net\.2|proj_out|out_proj|mlp\.fc2", 0.5),
    (r"post_quant_conv", 0.05),
    (r"quant_conv", 2.0),
    (r"decoder\.conv_out", 0.6),
    (r"layers\.\d+\.conv\.4", 0.5),
    (r"layers\.\d+\.conv", 1.4),  # before a ReLU, which halves the square
    (r"decoder\.layers\.18", 0.5),  # AutoencoderTiny's last
    (r"conv_out", 3.0),
    (r"", 1.0),
)
_SPREAD = 0.1  # of biases, and of norm weights around 1

_README = """---
license: apache-2.0
---
# {name}, with random weights

The architecture, configs and file layout of {name}; every weight is a random number drawn with seed {seed}.
It makes no meaningful pictures. It is for testing software and measuring speed. Written by turbochain.
"""
_LICENSE = """These weights are random numbers, and are licensed under the Apache License, Version 2.0.
You may obtain a copy of the License at https://www.apache.org/licenses/LICENSE-2.0
"""


def models(name: str, *, eos_token_id: int = 2, device: str | torch.device = "meta") -> dict[str, torch.nn.Module]:
    """Return component → module of the preset `name`, by default on the meta device: shapes and config, no memory.

    On another device it has the initial weights of its libraries; see `draw_weights`.
    `eos_token_id` is what the text encoders' configs say: 2, as published (transformers then pools at the
    largest id), or 49407, the true one (it pools at the first match). Raises InputError for an unknown name.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    chosen = presets.preset(name)
    special = {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 1}
    sizes = {"vocab_size": VOCABULARY_SIZE, "max_position_embeddings": MAX_TOKENS}
    parts: dict[str, torch.nn.Module] = {}
    with torch.device(device):
        for i, config in enumerate(chosen.text):
            kind = CLIPTextModelWithProjection if i else CLIPTextModel
            parts[_numbered("text_encoder", i)] = kind(CLIPTextConfig(**sizes, **special, **config))
        parts["unet"] = UNet2DConditionModel(**_UNET | chosen.unet)
        parts["vae"] = AutoencoderKL(**_VAE | chosen.vae)
    return parts


def draw_weights(parts: Mapping[str, torch.nn.Module], generator: torch.Generator) -> None:
    """Give the models of a preset, on the generator's device, random weights, in evaluation mode and without gradients.

    From a CPU generator with the seed of `write_checkpoint` they are that checkpoint's.
    """
    for part in parts.values():
        part.eval().requires_grad_(False)
        for name, tensor in part.state_dict().items():
            tensor.copy_(_draw(name, tensor.shape, generator))


def write_checkpoint(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    eos_token_id: int = 2,
    progress: Callable[[int, int], None] | None = None,
    before_weights: Callable[[Path, dict[str, int], int], None] | None = None,
) -> None:
    """Write the preset `name` into `folder` (created, overwritten) as a checkpoint that diffusers loads.

    The same seed gives the same weights (bit for bit on one machine; PyTorch's normal numbers differ in
    the last bits between CPU types). Weights are streamed to disk, one tensor in memory at a time.
    `eos_token_id` is as in `models`. `progress(done, total)` is called with numbers of parameters.
    `before_weights(folder, counts, bytes)`, with each component's number of values and the bytes to come, is called
    when all but the weights is written; it may raise. Raises InputError for an unknown name.
    """
    chosen = presets.preset(name)
    folder = Path(folder)
    parts = models(name, eos_token_id=eos_token_id)
    write_settings(name, folder, parts)
    (folder / "README.md").write_text(_README.format(name=name, seed=seed))
    (folder / "LICENSE").write_text(_LICENSE)
    counts = {component: sum(p.numel() for p in part.parameters()) for component, part in parts.items()}
    done, total = 0, sum(counts.values())
    if before_weights:
        before_weights(folder, counts, total * (2 if chosen.fp16 else 4))
    generator = torch.Generator().manual_seed(seed)
    for component, part in parts.items():
        for written in _write_weights(folder / component, part, chosen.fp16, generator):
            done += written
            if progress:
                progress(done, total)


def write_tiny_vae(name: str, folder: Path, *, seed: int = 0) -> None:
    """Write into `folder` (created) an AutoencoderTiny with random weights that decodes the preset's latents."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        part = AutoencoderTiny(**presets.preset(name).tiny)
    _write_config(part, folder, False)
    for _ in _write_weights(folder, part, False, torch.Generator().manual_seed(seed)):
        pass


def _numbered(component: str, i: int) -> str:
    return f"{component}_{i + 1}" if i else component


def write_settings(name: str, folder: Path, parts: Mapping[str, torch.nn.Module] | None = None) -> None:
    """Write into `folder` (created) all of the preset's checkpoint but weights and licence, as it was published.

    `parts`: its models, if they are there already. Raises InputError for an unknown name.
    """
    import diffusers

    chosen, parts = presets.preset(name), parts or models(name)
    folder.mkdir(parents=True, exist_ok=True)
    index: Config = {
        "_class_name": chosen.pipeline,
        "_diffusers_version": diffusers.__version__,
        **chosen.extra,
    }
    for i, pad in enumerate(chosen.pads):
        tokenizer = _numbered("tokenizer", i)
        (folder / tokenizer).mkdir(exist_ok=True)
        write_tokenizer(folder / tokenizer, pad_token=pad)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", chosen.scheduler]
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = {"_class_name": chosen.scheduler, "_diffusers_version": diffusers.__version__}
    settings |= presets.SCHEDULER | chosen.settings
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for component, part in parts.items():
        _write_config(part, folder / component, chosen.fp16)
        index[component] = ["transformers" if component.startswith("text") else "diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_config(part: torch.nn.Module, folder: Path, fp16: bool) -> None:
    if hasattr(part, "save_config"):  # a diffusers model
        part.save_config(folder)
        return
    part.config.architectures = [type(part).__name__]
    part.config.dtype = "float16" if fp16 else "float32"
    part.config.save_pretrained(folder)


def _write_weights(folder: Path, part: torch.nn.Module, fp16: bool, generator: torch.Generator) -> Iterator[int]:
    """Write random weights for `part`, tensor by tensor, as safetensors; yields each one's size."""
    stem = "diffusion_pytorch_model" if hasattr(part, "save_config") else "model"
    path = folder / f"{stem}{'.fp16' if fp16 else ''}.safetensors"
    # Published text encoders carry this prefix in every name; transformers 5 drops it when it loads.
    prefix = "text_model." if type(part).__name__ == "CLIPTextModel" else ""
    header: Config = {"__metadata__": {"format": "pt"}}
    tensors, end = part.state_dict(), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * (2 if fp16 else 4)
        header[prefix + name] = {
            "dtype": "F16" if fp16 else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # The format: the header's length as 8 bytes, the header padded to a multiple of 8, the tensors.
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors.items():
            values = _draw(name, tensor.shape, generator)
            file.write(values.to(torch.float16 if fp16 else torch.float32).numpy().data)
            yield values.numel()


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw random float32 values for the parameter `name`: a bias, a norm's weight, or a matrix or convolution."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        middle = 0.5 if name == "decoder.layers.18.bias" else 0.0  # AutoencoderTiny's pictures are 0 to 1
        return values.mul_(_SPREAD).add_(1.0 if name.endswith("weight") else middle)
    fan_in = 1 if "embedding.weight" in name else prod(shape[1:])
    gain = next(gain for pattern, gain in _GAINS if re.search(pattern, name))
    values.mul_(gain / fan_in**0.5)
    if name == "quant_conv.weight":
        values[len(values) // 2 :] *= 0.1  # the log-variances; the encoder's noise grows with their exponential
    return values
