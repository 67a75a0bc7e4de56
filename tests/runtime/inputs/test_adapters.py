"""LoRA files are read alike under every name, and what is no LoRA of the checkpoint is refused in a sentence."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_files
import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from lora_files import LDM, NAMINGS
from safetensors.torch import save_file

from turbochain.runtime import InputError
from turbochain.runtime.inputs import adapters
from turbochain.runtime.inputs.adapter_names import spellings

Tensors = dict[str, torch.Tensor]
DOWN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
UP, ALPHA = DOWN.replace("down", "up"), DOWN.replace("lora_down.weight", "alpha")
LAYER = DOWN.removesuffix(".lora_down.weight")


@pytest.mark.parametrize(("family", "naming"), [*(("sd", n) for n in NAMINGS), *(("sdxl", n) for n in (*NAMINGS, LDM))])
def test_one_adapter_is_the_same_under_every_name(
    family: str, naming: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    layers = lora_files.draw(checkpoints[family], ranks=(4, 1), alphas=(2.0, 0.5))
    path = lora_files.write(tmp_path / "lora.safetensors", layers, naming)
    read = adapters.read(path, lora_files.shapes(checkpoints[family]))
    found = {(c, name): added for c, parameters in read.components.items() for name, added in parameters.items()}
    assert found.keys() == {(c, f"{module}.weight") for c, module in layers}
    for (component, module), layer in layers.items():
        added = found[component, f"{module}.weight"]
        assert added.rank == len(layer.down)
        np.testing.assert_array_equal(added.down, layer.down.numpy())
        np.testing.assert_array_equal(added.up * np.float32(added.scale), (layer.up * layer.scale).numpy())


def test_text_encoders_are_found_with_and_without_the_prefix_that_transformers_dropped(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    layers = lora_files.draw(checkpoints["sd"], only="text_encoder")
    shapes = {"text_encoder": lora_files.shapes(checkpoints["sd"])["text_encoder"]}
    short = {"text_encoder": {name.removeprefix("text_model."): s for name, s in shapes["text_encoder"].items()}}
    files = {
        "long": lora_files.write(tmp_path / "long.safetensors", layers, "peft"),
        "short": tmp_path / "short.safetensors",
    }
    tensors = lora_files.tensors(layers, "peft")
    save_file({name.replace("text_model.", ""): t for name, t in tensors}, files["short"])
    for path in files.values():
        for known in (shapes, short):
            assert adapters.read(path, known).components["text_encoder"].keys() <= known["text_encoder"].keys()


def test_the_names_of_full_size_sdxl_are_those_that_diffusers_makes_of_stability_ais(tmp_path: Path) -> None:
    from turbochain.export.sources import synthetic

    unet = synthetic.models("sdxl-turbo")["unet"]
    modules = {n.removesuffix(".weight") for n, p in unet.named_parameters() if p.ndim > 1}
    known = spellings({"unet": [f"{module}.weight" for module in modules]})
    ldm = [n for n in known if n.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_"))]
    outside = [f"lora_unet_{n}" for n in ("time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2")]
    for name in (*ldm, *outside):
        file = {f"{name}.lora_{kind}.weight": torch.zeros(1) for kind in ("down", "up")}
        converted, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(file, unet.config))
        (theirs,) = {n.rsplit(".lora_", 1)[0] for n in convert_unet_state_dict_to_peft(converted)}
        assert f"{theirs}.weight" == f"unet.{known[name][1]}", name
    assert {known[name][1] for name in (*ldm, *outside)} == {f"{module}.weight" for module in modules}


def test_bfloat16_is_read_exactly_and_float16_as_a_view(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layers = lora_files.draw(checkpoints["sd"], dtype=dtype, only="mid_block.attentions")
        path = lora_files.write(tmp_path / f"{dtype}.safetensors", layers, "kohya")
        read = adapters.read(path, lora_files.shapes(checkpoints["sd"])).components["unet"]
        for (_, module), layer in layers.items():
            down = read[f"{module}.weight"].down
            np.testing.assert_array_equal(down.astype(np.float32), layer.down.float().numpy())
            assert down.dtype == np.float32 or isinstance(down.base, np.memmap)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def plus(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(1)}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "DoRA": (plus(f"{LAYER}.dora_scale"), "holds DoRA .* fuse it into the checkpoint"),
    "DoRA of peft": (plus("unet.mid_block.x.lora_magnitude_vector"), "holds DoRA"),
    "LoHa": (plus(f"{LAYER}.hada_w1_a"), "holds LoHa"),
    "LoKr": (plus(f"{LAYER}.lokr_w1"), "holds LoKr"),
    "Tucker": (plus(f"{LAYER}.lora_mid.weight"), "holds a Tucker decomposition"),
    "differences": (plus(f"{LAYER}.diff"), "holds full differences of weights"),
    "differences of biases": (plus(f"{LAYER}.diff_b"), "holds full differences of biases"),
    "biases": (plus("unet.mid_block.attentions.0.proj_in.lora_B.bias"), "holds changes of biases"),
    "a full weight": (plus("model.diffusion_model.out.2.weight"), "only tensors of a LoRA were expected"),
    "no such layer": (plus("lora_unet_other.lora_down.weight"), "changes lora_unet_other, and .* no layer"),
    "no second encoder": (plus("lora_te2_text_projection.alpha"), "no layer of that name; choose a LoRA"),
    "no up": (without(UP), "has no up matrix for mid_block"),
    "no down": (without(DOWN), "has no down matrix for mid_block"),
    "ranks": (lambda t: t | {UP: t[UP][:, :2].contiguous()}, r"they do not fit; choose a LoRA"),
    "a shape": (lambda t: t | {DOWN: t[DOWN][:, :2].contiguous()}, r"they do not fit"),
    "dimensions": (lambda t: t | {DOWN: t[DOWN][:, :, None, None]}, r"they do not fit"),
    "rank 0": (lambda t: t | {UP: t[UP][:, :0].clone(), DOWN: t[DOWN][:0].clone()}, r"they do not fit"),
    "no matrix": (lambda t: t | {UP: torch.ones(1), DOWN: torch.ones(1)}, r"they do not fit"),
    "NaN": (lambda t: t | {UP: t[UP] * float("nan")}, "holds NaN or infinity in lora_unet_mid_block"),
    "infinite alpha": (lambda t: t | {ALPHA: torch.tensor(float("inf"))}, "holds NaN or infinity"),
    "alphas": (lambda t: t | {ALPHA: torch.ones(2)}, r"has the shape \[2\]; one number was expected"),
    "integers": (lambda t: t | {DOWN: t[DOWN].to(torch.int32)}, "as I32, and F64, F32, F16, BF16 were expected"),
    "empty": (lambda t: {}, "holds no tensor"),
}


@pytest.fixture(scope="module")
def good(checkpoints: dict[str, Path]) -> Tensors:
    return dict(lora_files.tensors(lora_files.draw(checkpoints["sd"], only="mid_block.attentions"), "kohya"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_of_the_checkpoint_is_refused(
    case: str, good: Tensors, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    change, reason = REFUSED[case]
    save_file(change(dict(good)), tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=reason):
        adapters.read(tmp_path / "lora.safetensors", lora_files.shapes(checkpoints["sd"]))


def test_a_layer_that_is_changed_twice_is_refused(good: Tensors, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = dict(lora_files.tensors(lora_files.draw(checkpoints["sd"], only="mid_block.attentions"), "peft"))
    save_file(good | other, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"changes mid_block\S+ of the unet twice .*remove one of the two"):
        adapters.read(tmp_path / "lora.safetensors", lora_files.shapes(checkpoints["sd"]))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{", "no readable safetensors file"),
        ('{"unet.lora_alpha": "4"}', "gives '4' as the alpha of mid_block"),
        ('{"unet.alpha_pattern": {"attn1.to_q": null}}', "gives None as the alpha of mid_block"),
    ],
)
def test_metadata_that_is_no_config_is_refused(
    metadata: str, reason: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    layers = lora_files.draw(checkpoints["sd"], only="mid_block.attentions")
    named = {"lora_adapter_metadata": metadata}
    path = lora_files.write(tmp_path / "lora.safetensors", layers, "peft", named)
    with pytest.raises(InputError, match=reason):
        adapters.read(path, lora_files.shapes(checkpoints["sd"]))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lora.bin", b"PK\x03\x04", "is no safetensors file, .* runs code"),
        ("lora.safetensors", b"PK\x03\x04" + bytes(100), "no readable safetensors file"),
        ("lora.safetensors", b"", "no readable safetensors file"),
        ("lora.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("lora.safetensors", None, "is missing"),
        ("owner/of-the-hub", None, "is missing"),
        ("", None, "is a folder, and a LoRA file was expected"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        adapters.read(tmp_path / name, {})


def test_reading_needs_no_torch() -> None:
    script = "import sys; import turbochain.runtime.inputs.adapters; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
