"""A LoRA that is fused into the weights gives, bit for bit, the weights that diffusers and peft give."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_parity import load_diffusers

from turbochain.export import load
from turbochain.export.sources.adapters import read_all
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.runtime import InputError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    """Component and name → weight, of the parts that a LoRA can change."""
    parts = {c: pipeline.components[c] for c in COMPONENTS if c in pipeline.components}
    return {f"{c}.{name}": p.detach() for c, part in parts.items() for name, p in part.named_parameters()}


def ours(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The same of the components that graphs are traced of."""
    parts = {c: load.component(checkpoint, c, dtype) for c in COMPONENTS if c in checkpoint.family.components}
    return {f"{c}.{name}": p for c, part in parts.items() for name, p in part.named_parameters()}


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def changed(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> set[str]:
    return set(different(weights, ours(replace(checkpoint, adapters=()))))


def with_loras(folder: Path, *adapters: tuple[Path, float]) -> Checkpoint:
    return replace(open_folder(folder), adapters=adapters)


@pytest.fixture(scope="session")
def with_convolutions(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature of SD with 1x1 convolutions round its attention, as SD 1.x has them."""
    folder = tmp_path_factory.mktemp("sd1") / "checkpoint"
    shutil.copytree(checkpoints["sd"], folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_linear_projection": False}))
    (path,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(path)
    for name in (n for n in weights if n.endswith(("proj_in.weight", "proj_out.weight"))):
        weights[name] = weights[name][:, :, None, None]
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "naming", "rank", "alpha", "dtype", "strength"),
    [
        ("sd", "kohya", 4, 3.0, torch.float32, 0.7),
        ("sd", "diffusers-old", 1, 1.0, torch.float16, 1.0),
        ("sdxl", lora_files.LDM, 4, 1.0, torch.float16, -0.35),
        pytest.param("sdxl", "peft", 3, 3.0, torch.bfloat16, 0.6, marks=pytest.mark.full),
    ],
)
def test_every_layer_is_bit_for_bit_that_of_diffusers(
    family: str,
    naming: str,
    rank: int,
    alpha: float,
    dtype: torch.dtype,
    strength: float,
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    layers = lora_files.draw(checkpoints[family], ranks=(rank,), alphas=(alpha,), dtype=dtype)
    path = lora_files.write(tmp_path / "lora.safetensors", layers, naming)
    checkpoint = with_loras(checkpoints[family], (path, strength))
    found = ours(checkpoint)
    assert not different(found, weights_of(load.pipeline(checkpoint)))
    assert len(changed(checkpoint, found)) == len(layers)


def test_one_by_one_convolutions(with_convolutions: Path, tmp_path: Path) -> None:
    layers = lora_files.draw(with_convolutions, alphas=(1.0,), only="proj_")
    assert any(layer.down.shape[2:] == (1, 1) for layer in layers.values())
    path = lora_files.write(tmp_path / "lora.safetensors", layers, "kohya")
    checkpoint = with_loras(with_convolutions, (path, 0.8))
    found = ours(checkpoint)
    assert not different(found, weights_of(load.pipeline(checkpoint)))
    assert len(changed(checkpoint, found)) == len(layers)


def test_several_are_added_in_their_order_as_with_set_adapters(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """peft adds one after the other to the weight: (W + first) + second."""
    names, strengths = ["style", "distilled", "text"], [0.8, 1.0, 0.5]
    drawn = [
        lora_files.draw(checkpoints["sd"], seed=1, alphas=(3.0,)),
        lora_files.draw(checkpoints["sd"], seed=2, ranks=(1,), alphas=(1.0,), only="unet"),
        lora_files.draw(checkpoints["sd"], seed=3, only="text_encoder"),
    ]
    paths = [lora_files.write(tmp_path / f"{n}.safetensors", d, "kohya") for n, d in zip(names, drawn, strict=True)]
    checkpoint = with_loras(checkpoints["sd"], *zip(paths, strengths, strict=True))
    theirs = load_diffusers(checkpoints["sd"])
    for name, path in zip(names, paths, strict=True):
        theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    theirs.set_adapters(names, strengths)
    theirs.fuse_lora(components=["unet", "text_encoder"])
    theirs.unload_lora_weights()
    found = ours(checkpoint)
    assert not different(found, weights_of(theirs))
    assert not different(found, weights_of(load.pipeline(checkpoint)))


def test_half_precision_is_the_merged_fp32_rounded_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "lora.safetensors", lora_files.draw(checkpoints["sd"]), "kohya")
    checkpoint = with_loras(checkpoints["sd"], (path, 1.0))
    rounded = {name: weight.half() for name, weight in ours(checkpoint).items()}
    assert not different(ours(checkpoint, torch.float16), rounded)


def test_weights_in_several_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "lora.safetensors", lora_files.draw(checkpoints["sd"], only="unet"), "kohya")
    whole = with_loras(checkpoints["sd"], (path, 1.0))
    shutil.copytree(checkpoints["sd"], tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "unet")
    unet = load.component(replace(whole, adapters=()), "unet", torch.float32)
    unet.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="1MB")
    sharded = with_loras(tmp_path / "sharded", (path, 1.0))
    assert len(sharded.weights["unet"]) > 1
    assert not different(ours(sharded), ours(whole))


def test_ranks_and_alphas_of_their_own_are_those_of_the_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As kohya's resize_lora writes them; diffusers alone gives all attention layers one alpha."""
    layers = lora_files.draw(checkpoints["sd"], ranks=(2, 4, 1), alphas=(1.0, 2.0, 3.0, 5.0))
    path = lora_files.write(tmp_path / "lora.safetensors", layers, "kohya")
    checkpoint = with_loras(checkpoints["sd"], (path, 1.0))
    found, reference = ours(checkpoint), weights_of(load.pipeline(checkpoint))
    assert max(float((found[name] - reference[name]).abs().max()) for name in found) <= 1e-6
    base = ours(replace(checkpoint, adapters=()))
    for (component, module), layer in layers.items():
        name = f"{component}.{module.removeprefix('text_model.')}.weight"
        added = layer.scale * torch.einsum("or,ri->oi", layer.up.flatten(1), layer.down.flatten(1))
        torch.testing.assert_close(found[name], base[name] + added.reshape(base[name].shape), rtol=0, atol=1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "alphas": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 3, "down_blocks.0.attentions.0.proj_in": 5}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"attn2.to_k": 2}},
}


def saved(pipeline: Any, config: LoraConfig, folder: Path, alone: bool) -> Path:
    """The file that diffusers saves of a random adapter of a UNet; `alone`: by the UNet, so without its prefix."""
    pipeline.unet.add_adapter(config, "default")
    if alone:
        pipeline.unet.save_lora_adapter(folder)
    else:
        metadata = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict()}
        pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipeline.unet), **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(("name", "alone"), [("alpha", False), ("alphas", True), ("alphas", False), ("rslora", False)])
def test_the_alpha_in_the_metadata_that_diffusers_writes(
    name: str, alone: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    targets = ["to_q", "to_k", "proj_in", "ff.net.2", "conv1"]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, **CONFIGS[name])
    path = saved(load_diffusers(checkpoints["sd"]), config, tmp_path, alone)
    checkpoint = with_loras(checkpoints["sd"], (path, 0.5))
    found = ours(checkpoint)
    assert not different(found, weights_of(load.pipeline(checkpoint)))
    assert changed(checkpoint, found)


def test_a_prepared_reference_needs_peft(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lora_files.write(tmp_path / "lora.safetensors", lora_files.draw(checkpoints["sd"], only="mid_block"), "peft")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(InputError, match=r"pip install peft$"):
        load.pipeline(with_loras(checkpoints["sd"], (path, 1.0)))


def test_a_layer_that_diffusers_leaves_out_is_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """It reads `add_embedding_linear_1` as `add.embedding.linear.1`, and goes on without that layer."""
    layers = lora_files.draw(checkpoints["sdxl"], only="unet.add_embedding")
    layers |= lora_files.draw(checkpoints["sdxl"], only="unet.mid_block.attentions")
    path = lora_files.write(tmp_path / "lora.safetensors", layers, "kohya")
    with pytest.raises(
        InputError, match=r"add_embedding\.linear_1\.weight of the unet \(2 such in all\), which diffusers"
    ):
        load.pipeline(with_loras(checkpoints["sdxl"], (path, 1.0)))


def test_a_lora_of_another_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "lora.safetensors", lora_files.draw(checkpoints["sdxl"]), "kohya")
    with pytest.raises(InputError, match="choose a LoRA that was trained for this model"):
        read_all(with_loras(checkpoints["sd"], (path, 1.0)))
