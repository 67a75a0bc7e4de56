"""What is said of a checkpoint before it is loaded: its files and its licence."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from turbochain.export.sources.checkpoint import license_of, open_folder
from turbochain.runtime import InputError


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The SD miniature's layout, its weights linked to the originals."""
    shutil.copytree(checkpoints["sd"], tmp_path / "c", copy_function=link)
    return tmp_path / "c"


def link(original: str, copy: str) -> None:
    if original.endswith(".safetensors"):
        Path(copy).symlink_to(original)
    else:
        shutil.copy(original, copy)


def rename_weights(folder: Path, infix: str, *parts: str) -> None:
    for part_ in parts:
        (path,) = (folder / part_).glob("*.safetensors")
        path.rename(path.with_name(path.name.replace(".safetensors", f"{infix}.safetensors")))


PARTS = ("text_encoder", "unet", "vae")


def test_an_opened_folder(checkpoints: dict[str, Path]) -> None:
    for family, parts in (("sd", PARTS), ("sdxl", ("text_encoder", "text_encoder_2", "unet", "vae"))):
        checkpoint = open_folder(checkpoints[family], None)
        assert checkpoint.family.name == family and checkpoint.variant is None
        assert tuple(checkpoint.weights) == parts == tuple(checkpoint.configs)
        model = diffusers.UNet2DConditionModel.from_pretrained(checkpoints[family] / "unet")
        assert checkpoint.parameters("unet") == model.num_parameters()


def test_an_fp16_only_folder_is_recognised(folder: Path) -> None:
    rename_weights(folder, ".fp16", *PARTS)
    checkpoint = open_folder(folder, None)
    assert checkpoint.variant == "fp16"
    assert all(path.name.endswith(".fp16.safetensors") for (path,) in checkpoint.weights.values())


def test_a_variant_of_some_parts_only(folder: Path) -> None:
    rename_weights(folder, ".fp16", "unet")
    weights = open_folder(folder, "fp16").weights
    assert [path.name for paths in weights.values() for path in paths] == [
        "model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(InputError, match="unet has no safetensors weights; it has the variant 'fp16'"):
        open_folder(folder, None)


def test_a_variant_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="has no variant 'fp17': it has none"):
        open_folder(folder, "fp17")
    rename_weights(folder, ".fp16", "unet")
    with pytest.raises(InputError, match="has no variant 'fp17': it has fp16"):
        open_folder(folder, "fp17")


def shard(folder: Path, names: Any, infix: str = "") -> None:
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(folder / "unet" / f"diffusion_pytorch_model{infix}-00001-of-00001.safetensors")
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{infix}.json"
    index.write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_shards(folder: Path, infix: str) -> None:
    name = f"diffusion_pytorch_model{infix}-00001-of-00001.safetensors"
    shard(folder, {"a": name, "b": name}, infix)
    checkpoint = open_folder(folder, infix.removeprefix(".") or None)
    assert checkpoint.weights["unet"] == (folder / "unet" / name,)


@pytest.mark.parametrize("names", [None, [], {"a": 1}, {"a": "../vae/x.safetensors"}, {"a": "/etc/x.safetensors"}])
def test_an_index_of_shards_that_is_not_sound(folder: Path, names: Any) -> None:
    shard(folder, names)
    with pytest.raises(InputError, match="should map every weight to the name of a file beside it"):
        open_folder(folder, None)


@pytest.mark.parametrize("entry", [None, [], "x", ["os", "system"], ["transformers", None], [None, None]])
def test_no_other_library_is_imported(folder: Path, entry: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unet": entry}))
    with pytest.raises(InputError, match="names no class of diffusers or transformers as unet"):
        open_folder(folder, None)


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


DAMAGED = {
    "no header": b"",
    "header cut off": (1000).to_bytes(8, "little") + b"{",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": header(b"?????"),
    "a list": header(b"[]"),
    "no offsets": header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "an odd entry": header(b'{"a": 3}'),
    "cut off": header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
    "too long": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345678"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_weight_file(folder: Path, case: str) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()
    path.write_bytes(DAMAGED[case])
    with pytest.raises(InputError) as caught:
        open_folder(folder, None)
    assert str(caught.value).startswith(f"{path} is damaged (") and str(caught.value).endswith("; download it again")


LICENCES = {
    "---\nlicense: apache-2.0\n---\n": "apache-2.0",
    "---\nlicense: 'mit'\ntags: [x]\n---\ntext": "mit",
    "---\npipeline_tag: text-to-image\nlicense: other\nlicense_name: sai-nc-community\nlicense_link: >-\n  x\n---\n": (
        "sai-nc-community"
    ),
    "---\r\nlicense: openrail++\r\n---\r\n": "openrail++",
    "# A model\nlicense: mit\n": None,
    "---\ntags: [x]\n---\nlicense: mit\n": None,
    "": None,
}


@pytest.mark.parametrize("card", LICENCES)
def test_the_licence_on_the_model_card(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == LICENCES[card]


def test_no_model_card_or_one_in_another_encoding(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes("---\nlicense: mit\n---\ncafé".encode("latin-1"))
    assert license_of(tmp_path) == "mit"
