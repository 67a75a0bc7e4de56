"""Bad input: one clear sentence, exit status 2, no traceback, and nothing lost or half written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import called, command
from diffusers import (  # noqa: F401 - what a library says when they are imported is none of a build's sentences
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from here import phases_here
from refusals import refused
from safetensors.numpy import load_file, save_file

from turbochain.export import estimate, load
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.runtime import InputError

Folder = Path
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
TEXT_NORM = "text_model.final_layer_norm.bias"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD miniature that a test may damage."""
    shutil.copytree(checkpoints["sd"], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(name: str, edit: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Folder], None]:
    """Edit the tensors of one weight file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name)

    return damage


def with_lora(tensors: dict[str, np.ndarray]) -> None:
    """Name one layer's weights as peft does while a LoRA is loaded."""
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    layer, weight = name.removesuffix(".weight"), tensors.pop(name)
    tensors[f"{layer}.base_layer.weight"] = weight
    tensors[f"{layer}.lora_A.default.weight"] = weight[:2].copy()
    tensors[f"{layer}.lora_B.default.weight"] = weight[:, :2].copy()


def only_pickles(ending: str) -> Callable[[Folder], None]:
    return lambda folder: [(p.rename(p.with_suffix(ending))) and None for p in folder.glob("*/*.safetensors")]


def cut(name: str, size: int) -> Callable[[Folder], None]:
    return lambda folder: os.truncate(folder / name, size)


def scheduler(cls: str, **options: Any) -> Callable[[Folder], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / "scheduler/scheduler_config.json", _class_name=cls, **options)
        edit_json(folder / "model_index.json", scheduler=["diffusers", cls])

    return damage


FOLDERS: dict[str, tuple[Callable[[Folder], object], tuple[str, ...]]] = {
    "no model_index": (
        lambda f: (f / "model_index.json").unlink(),
        ("has no model_index.json", "the path of the .safetensors file"),
    ),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), ("model_index.json cannot be read",)),
    "index not an object": (lambda f: (f / "model_index.json").write_text("[]"), ("model_index.json",)),
    "pipeline class": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        ("FluxPipeline is not supported", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    ),
    "no pipeline class": (lambda f: (f / "model_index.json").write_text("{}"), ("pipeline class",)),
    "component missing": (lambda f: shutil.rmtree(f / "vae"), ("lacks vae/config.json",)),
    "component not in the index": (
        lambda f: edit_json(f / "model_index.json", unet=[None, None]),
        ("model_index.json", "unet"),
    ),
    "config not JSON": (lambda f: (f / "unet/config.json").write_text("?"), ("unet/config.json cannot be read",)),
    "config empty": (
        lambda f: (f / "unet/config.json").write_text("{}"),
        ("is not supported: a config.json in it lacks the key 'in_channels'",),
    ),
    "inpainting UNet": (
        lambda f: edit_json(f / "unet/config.json", in_channels=9),
        (
            "is not supported: the UNet reads 9 channels, those of a mask and of the masked image too",
            "--tasks inpainting",
        ),
    ),
    "ResNets of another kind": (
        lambda f: edit_json(f / "unet/config.json", resnet_time_scale_shift="ada_group"),
        ("is not supported: the UNet's ResNets read the time as 'ada_group', supported are 'default' and",),
    ),
    "blocks of another kind": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["KDownBlock2D"] * 4),
        ("is not supported: the UNet's ResNets read the time as 'ada_group', supported are 'default' and",),
    ),
    "only .bin": (only_pickles(".bin"), ("pickles are refused", "safe_serialization=True")),
    "only .ckpt": (only_pickles(".ckpt"), ("pickles are refused", "safe_serialization=True")),
    "no weights": (lambda f: (f / UNET).unlink(), ("unet has no safetensors weights",)),
    "weights cut off": (
        cut(UNET, 100_000),
        ("is damaged (", "file not fully covered", "download it again"),
    ),
    "header cut off": (cut(UNET, 1000), ("is damaged (", "invalid header length")),
    "empty weights": (cut(UNET, 0), ("is damaged",)),
    "a shard missing": (
        lambda f: [
            (f / UNET).unlink(),
            (f / f"{UNET}.index.json").write_text('{"weight_map": {"a": "x-00001-of-00001.safetensors"}}'),
        ],
        ("x-00001-of-00001.safetensors is missing",),
    ),
    "a LoRA beside its weights": (
        change(UNET, with_lora),
        ("saved with a LoRA that is not fused", "attn1.to_q.", "3 such in all", "pipe.fuse_lora()"),
    ),
    "a LoRA beside other weights, as diffusers once saved it": (
        change(TEXT, lambda t: t.update({"q_proj.lora_linear_layer.up.weight": t[TEXT_NORM]})),
        (TEXT, "saved with a LoRA that is not fused", "q_proj.lora_linear_layer.up.weight; 1 such in all"),
    ),
    "shards outside": (
        lambda f: [
            (f / UNET).rename(f.parent / "x.safetensors"),
            (f / f"{UNET}.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        ],
        ("should map every weight to the name of a file beside it",),
    ),
    "scheduler that clips": (
        scheduler("DDIMScheduler", thresholding=True),
        ("DDIMScheduler", "thresholding=True", "clipping is not linear", "--scheduler '{\"thresholding\": false}'"),
    ),
}


def build_refused(checkpoint: Path, status: int = 2, *options: str) -> str:
    """What `build-engine` says of a folder; the folder is untouched, and no bundle is there."""
    before, output = listing(checkpoint), checkpoint.parent / "x.bundle"
    said = refused(called("build-engine", checkpoint, "-o", output, "--size", "64x64", *options), status)
    assert listing(checkpoint) == before and not output.exists()
    return said


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_built(checkpoint: Path, case: str) -> None:
    damage, expected = FOLDERS[case]
    damage(checkpoint)
    with phases_here():
        said = build_refused(checkpoint)
    assert all(word in said for word in expected), said
    assert not (checkpoint.parent / "x.bundle.partial").exists()


@pytest.fixture
def no_bars() -> Iterator[None]:
    """For a build in this process: its own processes have what transformers prints in a file."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.mark.usefixtures("no_bars")
def test_weights_that_make_nan(checkpoint: Path) -> None:
    change(UNET, lambda t: t["conv_in.bias"].__setitem__(0, np.nan))(checkpoint)
    with phases_here():
        said = build_refused(checkpoint, 1)
    assert "diffusers' own fp32 picture" in said and "NaN" in said and "the weights are damaged" in said


PARTS: dict[str, tuple[Callable[[Folder], object], Callable[[Checkpoint], object], str]] = {
    "wrong shape": (
        change(UNET, lambda t: t.update({"conv_in.weight": t["conv_in.weight"][:, :3].copy()})),
        lambda c: load.component(c, "unet", torch.float32),
        r"unet .*conv_in.weight.* shape",
    ),
    "weight missing": (
        change(UNET, lambda t: t.pop("conv_in.bias")),
        lambda c: load.component(c, "unet", torch.float32),
        r"the weights in .*/unet lack conv_in.bias \(1 in all\)",
    ),
    "wrong shape of text weights": (
        change(TEXT, lambda t: t.update({TEXT_NORM: t[TEXT_NORM][:3].copy()})),
        lambda c: load.component(c, "text_encoder", torch.float32),
        r"wrong shape: .*final_layer_norm.bias is \[3\] and should be \[64\]",
    ),
    "text weight missing": (
        change(TEXT, lambda t: t.pop(TEXT_NORM)),
        lambda c: load.component(c, "text_encoder", torch.float32),
        r"the weights in .*/text_encoder lack .*final_layer_norm.bias \(1 in all\)",
    ),
    "unknown class": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet9D"]),
        lambda c: load.component(c, "unet", torch.float32),
        "unet cannot be loaded as UNet9D",
    ),
    "unknown scheduler": (scheduler("WarpScheduler"), load.scheduler, "scheduler cannot be loaded as WarpScheduler"),
    "no tokenizer": (
        lambda f: shutil.rmtree(f / "tokenizer"),
        lambda c: load.tokenizer(c, "tokenizer"),
        "tokenizer cannot be loaded as CLIPTokenizer",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_that_cannot_be_loaded(checkpoint: Path, case: str) -> None:
    damage, read, expected = PARTS[case]
    damage(checkpoint)
    with pytest.raises(InputError, match=expected) as caught:
        read(open_folder(checkpoint, None))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


SOURCES = {
    "unknown hub id": ("nobody/nothing", ("nobody/nothing", "cache", "check the id, or give the path of a local")),
    "no such folder": (
        "./here/is/nothing",
        ("./here/is/nothing is neither a .safetensors file here, nor a folder here, nor a hub id (owner/name)",),
    ),
    "no such name": ("sd-turbo", ("sd-turbo is neither a .safetensors file here, nor a folder here",)),
    "unknown preset": ("synthetic:dall-e", ("dall-e", "sd-turbo-mini", "sdxl-turbo")),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_is_not_there(tmp_path: Path, case: str) -> None:
    source, expected = SOURCES[case]
    said = refused(called("build-engine", source, "-o", "x.bundle", cwd=tmp_path))
    assert all(word in said for word in expected), said
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sd.safetensors").write_bytes(b"x")
    with phases_here():
        said = refused(called("build-engine", "sd.safetensors", cwd=tmp_path))
    assert "sd.safetensors is damaged" in said and "download it again" in said
    assert [p.name for p in tmp_path.iterdir()] == ["sd.safetensors"]


OPTIONS = {
    "size": (["--size", "100x64"], "size 100x64: width and height must be multiples of 8"),
    "size zero": (["--size", "0x0"], "size 0x0: width and height must be multiples of 8"),
    "size text": (["--size", "big"], "--size big: width x height was expected, such as 512x512"),
    "size one": (["--size", "512"], "--size 512: width x height was expected"),
    "steps zero": (["--steps", "0"], "counts from 1 to 50 were expected, such as 1-4 or 1,2,4"),
    "steps many": (["--steps", "1-51"], "counts from 1 to 50 were expected"),
    "steps backwards": (["--steps", "4-1"], "counts from 1 to 50 were expected"),
    "steps text": (["--steps", "few"], "--steps few: a range or a list was expected"),
    "steps negative": (["--steps=-1"], "--steps -1: a range or a list was expected"),
    "batch": (["--batch", "0"], "batch 0: at least 1 was expected"),
    "batch text": (["--batch", "many"], "--batch many: a number was expected, or several, such as 1,4"),
    "tasks": (["--tasks", "image"], "task 'image': choose from image-to-image, inpainting, stream, text-to-image"),
    "guidance": (["--guidance-scale=-1"], "guidance scale -1.0: a finite number of at least 0 was expected"),
    "precision": (["--precision", "int8"], "precision 'int8': choose fp32 or fp16"),
    "precision of the VAE": (["--vae-precision", "fp16"], "precision 'fp16' of the VAE: choose fp32 or bf16"),
    "precision of another backend": (
        ["--backend", "onnxruntime", "--vae-precision", "bf16"],
        "the backend onnxruntime cannot compute in bf16 on cpu, only in fp32 and fp16: choose another precision with "
        "build-engine's --precision or --vae-precision, or another backend with --backend",
    ),
    "backend": (["--backend", "abacus"], "there is no backend 'abacus': choose from tensorrt, onnxruntime, openvino"),
    "backend's helper": (
        ["--backend", "host"],
        "there is no backend 'host': choose from tensorrt, onnxruntime, openvino",
    ),
    "backend with a dot": (
        ["--backend", "a.b"],
        "there is no backend 'a.b': choose from tensorrt, onnxruntime, openvino",
    ),
    "device": (["--backend", "onnxruntime", "--device", "tpu"], "device='tpu': onnxruntime runs on 'cpu'; on a GPU"),
    "device of no backend": (["--device", "tpu"], "no backend can run here: device='tpu': cuda, or cuda:N for"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be(tmp_path: Path, case: str) -> None:
    options, expected = OPTIONS[case]
    said = refused(called("build-engine", "synthetic:sd-turbo-mini", *options, cwd=tmp_path))
    assert expected in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--opset", "many"], ["--speed"], []])
def test_usage(tmp_path: Path, options: list[str]) -> None:
    done = called("build-engine", *([] if not options else ["x"]), *options, cwd=tmp_path)
    assert done.returncode == 2 and "usage: build-engine" in done.stderr and "build-engine: error: " in done.stderr


@pytest.fixture
def no_room_for_weights() -> Iterator[None]:
    """Let no file grow over eight megabytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("no_room_for_weights")
def test_too_little_memory_is_told_before_the_work(tmp_path: Path) -> None:
    with phases_here():
        said = refused(called("build-engine", "synthetic:sdxl-turbo", "--size", "8192x8192", cwd=tmp_path))
    assert "too little room: the phase" in said and "of memory" in said and "--force tries all the same" in said
    assert not list(tmp_path.iterdir())


def test_too_little_room_and_force(tmp_path: Path) -> None:
    much = estimate.Needs({"reference": 1e15, "export": 1.0}, disk=1e18)
    with pytest.raises(InputError, match=r"the phase reference needs about .* GiB of memory, and .* of disk, and"):
        estimate.require(much, tmp_path, force=False)
    estimate.require(much, tmp_path, force=True)
    estimate.require(estimate.Needs({"export": 1.0}, disk=1.0), tmp_path, force=False)


def test_the_hubs_cache_serves_offline(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    cache, commit = tmp_path / "hub" / "models--stabilityai--sd-turbo", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree(checkpoints["sd"], cache / "snapshots" / commit)
    code = (
        "from pathlib import Path; from turbochain.export.sources import Want, find, parts\n"
        "checkpoint = parts.fetch(find('stabilityai/sd-turbo'), Want(Path()), {})\n"
        "print(checkpoint.revision, checkpoint.family.name)"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{commit} sd\n", done
    done = command("build-engine", "stabilityai/sd-turbo", "--revision", "v2", env=env, cwd=tmp_path)
    assert "stabilityai/sd-turbo" in refused(done)


@pytest.mark.parametrize(
    "line",
    [("build-engine", "none.bundle"), ("turbochain", "generate", "none.bundle", b"caf\xe9")],
    ids=lambda line: line[0],
)
def test_a_process_says_what_a_call_says(tmp_path: Path, line: tuple[Any, ...]) -> None:
    """`called` stands for `command` in this file."""
    script = Path(sys.executable).with_name(line[0])
    done = subprocess.run([script, *line[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused(done) == refused(called(*line, cwd=tmp_path)) and not list(tmp_path.iterdir())


def test_an_output_that_exists(sd: Path, sdxl: Path, checkpoints: dict[str, Path], copy_of, tmp_path: Path) -> None:
    folder, bundle, source = tmp_path / "photos", copy_of(sd), checkpoints["sd"]
    folder.mkdir()
    (folder / "cat.png").write_text("kept")
    before = listing(bundle)
    said = refused(called("build-engine", source, "-o", folder))
    assert "exists and is not a bundle: choose another path with -o" in said
    cases = {
        ("--size=128x64",): "sizes is [[64, 64]] there and [[128, 64]] here",
        ("--size=64x64", "--batch=2"): "batches is [1] there and [2] here",
        (): "sizes is [[64, 64]] there and [[512, 512]] here",
    }
    for options, named in cases.items():
        said = refused(called("build-engine", source, "-o", bundle, *options))
        assert "holds another build" in said and named in said and "choose another path with -o" in said
    said = refused(called("build-engine", sdxl, "-o", bundle))
    assert "holds another build (its files are not those of" in said and "choose another path with -o" in said
    assert listing(bundle) == before and (folder / "cat.png").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", bundle.name]


@pytest.mark.parametrize("output", ["/proc/x.bundle", "file/x.bundle"])
def test_an_output_that_cannot_be_made(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("kept")
    said = refused(called("build-engine", "synthetic:sd-turbo-mini", "-o", output, cwd=tmp_path))
    assert output in said and (tmp_path / "file").read_text() == "kept"
