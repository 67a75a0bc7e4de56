"""What is said of a checkpoint before it is loaded: its files and its licence."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from turbochain.export.sources import hub
from turbochain.export.sources.checkpoint import Checkpoint, is_hub_id, open_folder
from turbochain.runtime import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, about numpy

CONFIGS = ["model_index.json", "README.md", "LICENSE.md", "scheduler/scheduler_config.json"]
TOKENIZER = [f"tokenizer/{n}" for n in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")]
OTHERS = [".gitattributes", "output_tile.jpg", "images/a.png"]


def part(name: str, *variants: str) -> list[str]:
    """A component's folder on the hub: config, and its weights as safetensors and as pickles."""
    stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
    files = [f"{name}/{stem}{infix}{end}" for infix in variants for end in (".safetensors", ".bin")]
    return [f"{name}/config.json", *files]


def repository(*variants: str, second: bool = False) -> list[str]:
    names = ["text_encoder", "unet", "vae", *(["text_encoder_2"] if second else [])]
    tokenizers = [*TOKENIZER, *(n.replace("tokenizer", "tokenizer_2", 1) for n in TOKENIZER if second)]
    return [*CONFIGS, *OTHERS, *tokenizers, *(f for n in names for f in part(n, *variants))]


SD_TURBO = [*repository("", ".fp16"), "sd_turbo.safetensors"]
SDXL_TURBO = [
    *repository("", ".fp16", second=True),
    *("sd_xl_turbo_1.0.safetensors", "sd_xl_turbo_1.0_fp16.safetensors"),
    *("unet/model.onnx", "unet/model.onnx_data", "unet/openvino_model.bin", "unet/openvino_model.xml"),
    *("text_encoder/flax_model.msgpack", "vae_decoder/model.onnx", "vae_decoder/config.json"),
    *("vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"),
]
SD_15 = [*repository("", ".fp16"), *part("safety_checker", "", ".fp16"), "feature_extractor/preprocessor_config.json"]
SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
FP16_SHARDS = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARDED = [
    *(n for n in repository("", ".fp16") if "unet/diffusion" not in n),
    *("unet/diffusion_pytorch_model.safetensors.index.json", *SHARDS),
    *("unet/diffusion_pytorch_model.safetensors.index.fp16.json", *FP16_SHARDS),
]


def named(infix: str, second: bool = False) -> set[str]:
    """The safetensors of every component with this infix."""
    return {n for n in repository(infix, second=second) if n.endswith(".safetensors")}


WEIGHTS = {
    "sd-turbo": (SD_TURBO, None, named("")),
    "sd-turbo fp16": (SD_TURBO, "fp16", named(".fp16")),
    "sdxl-turbo": (SDXL_TURBO, None, named("", second=True)),
    "sdxl-turbo fp16": (SDXL_TURBO, "fp16", named(".fp16", second=True)),
    "fp16 only": (repository(".fp16"), None, named(".fp16")),
    "a safety checker": (SD_15, None, named("")),
    "sharded": (SHARDED, None, {*named("") - {"unet/diffusion_pytorch_model.safetensors"}, *SHARDS}),
    "sharded fp16": (
        SHARDED,
        "fp16",
        {*named(".fp16") - {"unet/diffusion_pytorch_model.fp16.safetensors"}, *FP16_SHARDS},
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_only_the_weights_that_are_needed_are_downloaded(case: str) -> None:
    names, variant, expected = WEIGHTS[case]
    chosen = hub.select(names, variant)
    assert len(chosen) == len(set(chosen))
    large = {n for n in chosen if not n.endswith((".json", ".txt", ".md"))}
    assert large == expected
    assert {*CONFIGS, *TOKENIZER} <= set(chosen)
    assert {n for n in names if n.endswith("config.json") and n.split("/")[0] in ("unet", "vae")} <= set(chosen)


def test_a_variant_that_the_hub_lacks_is_refused_before_the_download() -> None:
    with pytest.raises(InputError, match="the repository has no weights of variant 'fp16'"):
        hub.select(repository(""), "fp16")


@pytest.mark.parametrize("ending", [".bin", ".ckpt"])
def test_pickles_on_the_hub_are_refused(ending: str) -> None:
    names = [n.removesuffix(".bin") + ending for n in repository("") if not n.endswith(".safetensors")]
    with pytest.raises(InputError, match=r"only as pickles .* save_pretrained\(FOLDER, safe_serialization=True\)"):
        hub.select(names, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("owner/name", True), ("stabilityai/sd-turbo", True), ("a.b/c_d-1", True)]
    + [(text, False) for text in ("name", "a/b/c", "/a", "a/", "./a b", "", "synthetic:sd-turbo", "a/b\n")],
)
def test_what_looks_like_a_hub_id(text: str, expected: bool) -> None:
    assert is_hub_id(text) is expected


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
    assert Checkpoint(tmp_path, None).license() == LICENCES[card]


def test_no_model_card_or_one_in_another_encoding(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path, None).license() is None
    (tmp_path / "README.md").write_bytes("---\nlicense: mit\n---\ncafé".encode("latin-1"))
    assert Checkpoint(tmp_path, None).license() == "mit"
