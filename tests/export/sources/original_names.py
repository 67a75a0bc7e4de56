"""Weights in diffusers' names → the original ones, after the ldm and open_clip code, not diffusers'.

Only what the tests' miniatures have: UNets and VAEs of ResNets and transformers, CLIP's text encoders.
"""

import re

import torch

Tensors = dict[str, torch.Tensor]

_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
_UNET = {
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    **{"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    "self_attn.out_proj": "attn.out_proj",
}


def unet(weights: Tensors, layers_per_block: int) -> Tensors:
    """ldm's `UNetModel`: one list of input blocks, of which each ResNet and each downsampling is one."""
    period, attends = layers_per_block + 1, {n.split(".")[1] for n in weights if re.match(r"up_blocks\.\d+\.att", n)}
    found = {}
    for name, tensor in weights.items():
        place, tail = name, ""
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
            side, i, kind, j, tail = match[1], int(match[2]), match[3], int(match[4]), match[5]
            block = f"input_blocks.{period * i + j + 1}" if side == "down" else f"output_blocks.{period * i + j}"
            place = f"{block}.{0 if kind == 'resnets' else 1}"
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
            place, tail = f"middle_block.{2 * int(match[2]) if match[1] == 'resnets' else 1}", match[3]
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
            place, tail = f"input_blocks.{period * (int(match[1]) + 1)}.0.op", match[2]
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(conv\..+)", name):
            place = f"output_blocks.{period * int(match[1]) + layers_per_block}.{2 if match[1] in attends else 1}"
            tail = match[2]
        else:
            head, _, tail = name.rpartition(".")
            place = _UNET[head]
        head, _, last = tail.rpartition(".")
        found[f"{place}.{_RESNET.get(head, head)}.{last}" if head else f"{place}.{last}"] = tensor
    return found


def vae(weights: Tensors) -> Tensors:
    """ldm's `AutoencoderKL`: the decoder's levels are numbered from the pixels, attention is four 1×1 convolutions."""
    levels = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("decoder.up_blocks."))
    found = {}
    for name, tensor in weights.items():
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
        new = new.replace("down_blocks.", "down.").replace("downsamplers.0", "downsample")
        new = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", new)
        new = new.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
        new = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", new):
            new = f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        found[new] = tensor.contiguous()
    return found


def open_clip(weights: Tensors) -> Tensors:
    """open_clip's text tower: q, k and v in one matrix, the projection applied from the right."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    found = {
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        **{f"ln_final.{kind}": own[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")},
        "logit_scale": torch.ones(()),
    }
    width = found["positional_embedding"].shape[1]
    projection = own.get("text_projection.weight", torch.eye(width, device=own["final_layer_norm.bias"].device))
    found["text_projection"] = projection.T.contiguous()
    for name, tensor in own.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block = f"transformer.resblocks.{match[1]}"
            if match[2] in _OPEN_CLIP:
                found[f"{block}.{_OPEN_CLIP[match[2]]}.{match[3]}"] = tensor
            elif match[2] == "self_attn.q_proj":
                three = [own[f"encoder.layers.{match[1]}.self_attn.{x}_proj.{match[3]}"] for x in "qkv"]
                found[f"{block}.attn.in_proj_{match[3]}"] = torch.cat(three)
    return found


def one_more_layer(tower: Tensors) -> Tensors:
    """SD 2.x's file has a last layer that its text encoder does not use."""
    count = 1 + max(int(n.split(".")[2]) for n in tower if n.startswith("transformer."))
    last = f"transformer.resblocks.{count - 1}."
    return {n.replace(last, f"transformer.resblocks.{count}."): t + 1 for n, t in tower.items() if n.startswith(last)}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def checkpoint(parts: dict[str, Tensors], layers_per_block: int, clip: str) -> Tensors:
    """A whole file, by `clip`: "sd1" (CLIP in transformers' names), "sd2" (open_clip) or "sdxl" (both)."""
    whole = prefixed("model.diffusion_model.", unet(parts["unet"], layers_per_block))
    whole |= prefixed("first_stage_model.", vae(parts["vae"]))
    text = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in parts["text_encoder"].items()}
    if clip == "sd2":
        tower = open_clip(text)
        return whole | prefixed("cond_stage_model.model.", tower | one_more_layer(tower))
    if clip == "sdxl":
        whole |= prefixed("conditioner.embedders.1.model.", open_clip(parts["text_encoder_2"]))
    first = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}[clip]
    return whole | prefixed(first, text | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
