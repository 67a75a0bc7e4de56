"""The names that LoRA files give to the parameters of a checkpoint."""

from collections.abc import Iterable, Iterator, Mapping

PREFIXES = {
    "unet": ("unet.", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
"""Component → the prefix of its modules in diffusers' files, then those in kohya's."""

TEXT = "text_model."
"""Begins the names of a text encoder's parameters in checkpoints and in LoRA files, but not in transformers 5."""

_WEIGHT = ".weight"
_OLD = {
    **{f"attn{i}.to_out.0": f"attn{i}.to_out" for i in (1, 2)},
    **{f"self_attn.{x}_proj": f"self_attn.to_{x}" for x in ("q", "k", "v", "out")},
}
"""The end of a module's name → what diffusers once called it in LoRA files."""

_LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    **{f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)},
    **{f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1)},
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_LDM_INSIDE = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
"""A layer of a ResNet block → its name in Stability AI's code."""


def spellings(components: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, str]]:
    """Return module as a LoRA file spells it → (component, parameter), for all spellings of all matrices.

    `components`: "unet", "text_encoder" or "text_encoder_2" → the names of its parameters in the checkpoint. A name in
    a file is looked up with ".processor." replaced by ".".
    """
    found = {}
    for component, parameters in components.items():
        modules = {name.removesuffix(_WEIGHT): name for name in parameters if name.endswith(_WEIGHT)}
        ldm = _ldm(modules) if component == "unet" else {}
        for module, parameter in modules.items():
            for spelled in _spellings(component, module, ldm.get(module)):
                found[spelled] = component, parameter
    return found


def _spellings(component: str, module: str, ldm: str | None) -> Iterator[str]:
    diffusers, *kohya = PREFIXES[component]
    names = [module] if component == "unet" else [module.removeprefix(TEXT), TEXT + module.removeprefix(TEXT)]
    for name in names:
        yield from (prefix + name.replace(".", "_") for prefix in kohya)
        old = [name.removesuffix(new) + once for new, once in _OLD.items() if name.endswith(new)]
        yield from (diffusers + spelled for spelled in (name, *old))
        if component == "unet":  # the files of one UNet alone
            yield from (name, *old)
    if ldm:
        yield from (prefix + ldm.replace(".", "_") for prefix in kohya)


def _ldm(modules: Iterable[str]) -> dict[str, str]:
    """Return module of diffusers' UNet → its name in Stability AI's code, after which kohya's SDXL files are named."""
    modules = list(modules)
    blocks = _LDM_OUTSIDE | _ldm_blocks(modules)
    found = {}
    for module in modules:
        block = next((b for b in blocks if module == b or module.startswith(f"{b}.")), None)
        if block is not None:
            inside = module.removeprefix(block).removeprefix(".")
            found[module] = ".".join(filter(None, (blocks[block], _LDM_INSIDE.get(inside, inside))))
    return found


def _ldm_blocks(modules: Iterable[str]) -> dict[str, str]:
    """Return the ResNet blocks, attentions and resamplers of the UNet → their names in Stability AI's code.

    There the layers of all blocks on one side are numbered in one row: a downsampler has a number of its own, an
    upsampler the number of the ResNet block before it.
    """
    parts = {tuple(m.split(".")[:4]) for m in modules if m.startswith(("down_blocks.", "up_blocks."))}
    layers = {(side, int(block), kind, int(layer)) for side, block, kind, layer in parts}
    found, position = {}, 1  # input_blocks.0 is conv_in
    for block in sorted({b for side, b, _, _ in layers if side == "down_blocks"}):
        for layer in sorted(n for s, b, kind, n in layers if (s, b, kind) == ("down_blocks", block, "resnets")):
            found[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{position}.0"
            found[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{position}.1"
            position += 1
        if ("down_blocks", block, "downsamplers", 0) in layers:
            found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{position}.0.op"
            position += 1
    position = 0
    for block in sorted({b for side, b, _, _ in layers if side == "up_blocks"}):
        for layer in sorted(n for s, b, kind, n in layers if (s, b, kind) == ("up_blocks", block, "resnets")):
            found[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{position}.0"
            found[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{position}.1"
            position += 1
        place = 2 if ("up_blocks", block, "attentions", 0) in layers else 1
        found[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{position - 1}.{place}.conv"
    return found
