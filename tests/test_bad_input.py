"""Bad input: one clear sentence, exit status 2, no traceback, and nothing lost or half written."""

import importlib.metadata
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
import onnx
import pytest
import torch
import transformers
from conftest import called, command, reseal
from diffusers import (  # noqa: F401 - what a library says when they are imported is none of a build's sentences
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from here import phases_here
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import turbochain.runtime
from turbochain.export import estimate, load
from turbochain.export.sources.checkpoint import Checkpoint, open_folder
from turbochain.runtime import Bundle, InputError, PictureError, Pipeline, TurbochainError

Folder = Path
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
TEXT_NORM = "text_model.final_layer_norm.bias"


def refused(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one sentence of a command that failed; above it may stand its backend and phases, nothing else."""
    assert done.returncode == status, done
    assert done.stdout == "" and "Traceback" not in done.stderr, done
    *phases, last = done.stderr.splitlines()
    assert all(line.startswith("backend ") or line.endswith((" s", " …")) for line in phases), phases
    program, error, sentence = last.split(": ", 2)
    assert program in ("turbochain", "build-engine") and error == "error", last
    assert 20 < len(sentence) < 900, sentence
    return sentence


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


def environment(folder: Path, *distributions: str) -> Path:
    """A real environment that has only these distributions (linked to ours) and turbochain; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site / "turbochain").mkdir()
    for part in ("runtime", "export", "engines"):
        (site / "turbochain" / part).symlink_to(Path(turbochain.runtime.__file__).parents[1] / part)
    return folder / "bin" / "python"


BASE = ("numpy", "tokenizers", "safetensors", "pillow")


def test_a_backend_that_is_not_installed(sd: Path, checkpoints: dict[str, Path], copy_of, tmp_path: Path) -> None:
    python, bundle = environment(tmp_path / "env", *BASE), copy_of(sd)
    before = listing(bundle)
    lines = [
        ("turbochain.runtime.commands.main", "generate", bundle, "a cat"),
        ("turbochain.runtime.commands.main", "generate", bundle, "a cat", "--backend", "onnxruntime"),
        ("turbochain.runtime.commands.main", "verify", bundle),
        ("turbochain.runtime.commands.main", "bench", bundle),
        ("turbochain.engines.cli", bundle),
        ("turbochain.engines.cli", checkpoints["sd"], "--backend", "onnxruntime"),
    ]
    for line in lines:
        done = subprocess.run([python, "-m", *map(str, line)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        said = refused(done)
        assert "installed: pip install 'turbochain[cpu]'" in said, said
    show = [python, "-m", "turbochain.runtime.commands.main", "inspect", bundle]
    done = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "does not fit: its backend onnxruntime is not installed" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env", bundle.name] and listing(bundle) == before


def test_the_exporter_is_not_installed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "env", *BASE, "onnxruntime")
    line = [python, "-m", "turbochain.engines.cli", checkpoints["sd"]]
    said = refused(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60))
    assert "torch" in said and said.endswith("pip install 'turbochain[export]'")
    assert [p.name for p in tmp_path.iterdir()] == ["env"]


OUTPUTS = {
    "no folder": ("none/out.png", "there is no folder"),
    "a folder": ("folder.png", "it is a folder"),
    "no ending": ("out", "names no picture format; try .png"),
    "unknown ending": ("out.txt", "'.txt' names no picture format; try .png"),
    "a format that is only read": ("out.psd", "try .png"),
    "a format without colours": ("out.xbm", "cannot write mode RGB as XBM; try .png"),
    "a format of which PIL has the name": ("out.hdf", "HDF5 save handler not installed; try .png"),
    "no permission": ("/proc/out.png", "cannot write /proc/out.png"),
    "a full device": ("/dev/full", "cannot write /dev/full"),
    "below a file": ("file/out.png", "there is no folder file"),
    "long": ("x" * 300 + ".png", "cannot write"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_picture_that_cannot_be_written(sd: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    output, expected = OUTPUTS[case]
    said = refused(called("turbochain", "generate", sd, "a cat", "-o", output, cwd=tmp_path))
    assert expected in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_keeps_the_old_picture(sd: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, which needs no privilege."""
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=8k none disk && echo old > disk/out.png && "
        '"$@"; status=$?; cat disk/out.png; ls -A disk; exit $status'
    )
    line = [Path(sys.executable).with_name("turbochain"), "generate", sd, "a cat", "-o", "disk/out.png"]
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    done = subprocess.run([*own, *map(str, line)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "old\nout.png\n"), done
    assert done.stderr.startswith("turbochain: error: no space left to write disk/out.png"), done.stderr


COMMANDS = {
    "no bundle": (["generate", "none.bundle", "x"], "none.bundle is not a bundle: there is no such folder; build one:"),
    "steps": (["generate", "{sd}", "x", "--steps", "9"], "built for these step counts: 1, 2, 3, 4; build another"),
    "seed negative": (["generate", "{sd}", "x", "--seed", "-1"], "-1"),
    "seed large": (["generate", "{sd}", "x", "--seed", str(2**64)], str(2**64)),
    "backend": (["generate", "{sd}", "x", "--backend", "abacus"], "there is no backend 'abacus'"),
    "device": (["generate", "{sd}", "x", "--device", "tpu"], "tpu"),
    "threads": (["generate", "{sd}", "x", "--threads", "0"], "threads=0: a whole number of at least 1 was expected"),
    "threads many": (["generate", "{sd}", "x", "--threads", "1000"], "threads=1000: at most "),
    "prompt long": (["generate", "{sd}", "x" * 32769], "32,769 bytes long as UTF-8: expected at most 32,768"),
    "prompt not UTF-8": (["generate", "{sd}", b"caf\xe9"], "lone surrogate U+DCE9 at position 3"),
    "runs": (["bench", "{sd}", "--runs", "0"], "--runs 0: at least 1 was expected"),
    "bench steps": (["bench", "{sd}", "--steps", "0"], "built for these step counts: 1, 2, 3, 4; build another"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_arguments_of_turbochain(sd: Path, tmp_path: Path, case: str) -> None:
    arguments, expected = COMMANDS[case]
    line = [a if isinstance(a, bytes) else a.format(sd=sd) for a in arguments]
    done = called("turbochain", *line, cwd=tmp_path)
    assert expected in refused(done) and not list(tmp_path.iterdir())


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


NOISE = np.zeros((1, 4, 8, 8), np.float32)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt None": ({"prompt": None}, "prompt is None: give a prompt, or its prompt_embeds"),
    "prompt bytes": ({"prompt": b"a cat"}, "prompt is of type bytes: expected a str"),
    "prompt number": ({"prompt": 3}, "prompt is of type int: expected a str"),
    "prompt dict": ({"prompt": {"a": 1}}, "prompt is of type dict: expected a str"),
    "list with a number": ({"prompt": ["a", 3]}, "prompt is of type int: expected a str"),
    "no prompt": ({"prompt": []}, "at least one prompt was expected"),
    "NUL": ({"prompt": "a\0b"}, "NUL character at position 1"),
    "lone surrogate": ({"prompt": "ab\ud83d"}, "lone surrogate U+D83D at position 2"),
    "over 32 KiB": ({"prompt": "é" * 16385}, "32,770 bytes long as UTF-8: expected at most 32,768 (32 KiB)"),
    "second prompt": ({"prompt": ["fine", "a\0"]}, "NUL character"),
    "no steps": (
        {"num_inference_steps": 0},
        "=0: this bundle was built for these step counts: 1, 2, 3, 4;",
    ),
    "too many steps": ({"num_inference_steps": 5}, "num_inference_steps=5"),
    "steps float": ({"num_inference_steps": 1.0}, "num_inference_steps=1.0"),
    "steps bool": ({"num_inference_steps": True}, "num_inference_steps=True"),
    "steps text": ({"num_inference_steps": "1"}, "num_inference_steps='1'"),
    "seed negative": ({"seed": -1}, "-1"),
    "seed too large": ({"seed": 2**64}, str(2**64)),
    "seed bool": ({"seed": True}, "True"),
    "seed float": ({"seed": 1.0}, "seed=1.0"),
    "seed text": ({"seed": "1"}, "seed='1'"),
    "seed list short": ({"seed": [1], "prompt": ["a", "b"]}, "one integer for each of 2 pictures"),
    "seed list long": ({"seed": [1, 2]}, "one integer for each of 1 pictures"),
    "seed list empty": ({"seed": []}, "one integer for each of 1 pictures"),
    "seed list bad": ({"seed": [-1]}, "-1"),
    "seed list float": ({"seed": [0.5]}, "0.5"),
    "latents list": ({"latents": NOISE.tolist()}, "latents is of type list: an array of float32 [1, 4, 8, 8]"),
    "latents shape": ({"latents": NOISE[0]}, "latents is float32 [4, 8, 8]: an array of float32 [1, 4, 8, 8]"),
    "latents count": ({"latents": NOISE, "prompt": ["a", "b"]}, "an array of float32 [2, 4, 8, 8] was expected"),
    "latents dtype": ({"latents": NOISE.astype(np.float64)}, "latents is float64"),
    "latents fp16": ({"latents": NOISE.astype(np.float16)}, "latents is float16"),
    "latents NaN": ({"latents": np.full_like(NOISE, np.nan)}, "latents holds NaN or infinite values"),
    "latents infinite": ({"latents": np.full_like(NOISE, np.inf)}, "latents holds NaN or infinite values"),
    "guidance infinite": ({"guidance_scale": float("inf")}, "guidance_scale=inf: a finite number was expected"),
    "guidance beyond fp32": ({"guidance_scale": 1e39}, "guidance_scale=1e+39: a finite number was expected, in fp32"),
    "guidance an integer beyond fp64": ({"guidance_scale": 10**400}, "a finite number was expected, in fp32"),
    "guidance bool": ({"guidance_scale": True}, "guidance_scale=True"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    "guidance text": ({"guidance_scale": "0"}, "guidance_scale='0'"),
    "negative prompts": (
        {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
        "negative_prompt is a list of 2: one, or one for each of 1 prompts was expected",
    ),
    "negative prompt number": (
        {"negative_prompt": 3, "guidance_scale": 2.0},
        "the negative_prompt is of type int: expected a str",
    ),
    "no negative prompt": ({"negative_prompt": [], "guidance_scale": 2.0}, "negative_prompt=[]: at least one prompt"),
    "strength": ({"strength": 0.5}, "strength was given, and the chain text-to-image starts from no image; leave it"),
    "height zero": ({"height": 0}, "height=0"),
    "height text": ({"height": "64"}, "height='64': a multiple of 8 in pixels was expected; turbochain inspect shows"),
    "height float": ({"height": 64.0}, "height=64.0: a multiple of 8"),
    "width odd": ({"width": 100}, "width=100: a multiple of 8"),
    "width array": ({"width": np.array([64, 64])}, "width=array([64, 64]): a multiple of 8"),
    "modes text": ({"modes": "guidance"}, "modes='guidance': a list of names was expected; give ['guidance']"),
    "output type": ({"output_type": "pt"}, "output_type='pt': choose from pil, np, uint8"),
    "output type list": ({"output_type": ["pil"]}, "output_type=['pil']"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: a whole number of at least 1"),
    "images float": ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5"),
    "images bool": ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
}
CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 128}, "this bundle is built for 64x64; build another with build-engine SOURCE --size 64x128"),
    "width": ({"width": 128, "height": 64}, "build-engine SOURCE --size 128x64"),
    "width of another chain": (
        {"width": 128, "chain": "text-to-image"},
        "height=64, width=128: the chain text-to-image is built for 64x64; leave out the chain or the size",
    ),
    "chain list": ({"chain": ["text-to-image"]}, "chain=['text-to-image']: this bundle has text-to-image, image-to"),
    "chain empty": ({"chain": ""}, "chain='': this bundle has text-to-image"),
}
"""Of these a chain is chosen, which a request has already."""


@pytest.fixture(scope="module")
def pipe(sd: Path):
    with Pipeline.load(sd) as loaded:
        yield loaded


@pytest.mark.parametrize("case", [*CALLS, *CHOICES])
def test_arguments_of_a_call(pipe: Pipeline, case: str) -> None:
    arguments, expected = {**CALLS, **CHOICES}[case]
    with pytest.raises(InputError) as caught:
        pipe(**{"prompt": "a cat", "seed": 0, **arguments})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert pipe("a cat", seed=0, output_type="uint8").images.shape == (1, 64, 64, 3)  # and it still works


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"threads": 1.5}, {"threads": True}])
def test_threads(sd: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"threads=.*: a whole number of at least 1 was expected"):
        Pipeline.load(sd, **options)


def test_use_after_close(sd: Path) -> None:
    pipe = Pipeline.load(sd)
    pipe.close()
    pipe.close()
    for use in (lambda: pipe("a cat", seed=0), pipe.warmup):
        with pytest.raises(TurbochainError, match="the pipeline is closed; load it again"):
            use()


def replace(bundle: Path, graph: str, value: float) -> None:
    """Put a graph of the same inputs and outputs, all constant, in a bundle; hashes and engine stay consistent."""
    entry = Bundle.open(bundle).manifest.graphs[graph]
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
    inputs = [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in entry.inputs]
    outputs = [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in entry.outputs]
    (output,) = entry.outputs
    constant = numpy_helper.from_array(np.full(output.shape, value, output.dtype), "constant")
    nodes = [helper.make_node("Identity", ["constant"], [output.name])]
    body = helper.make_graph(nodes, graph, inputs, outputs, [constant])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, bundle / entry.file)
    reseal(bundle)


PICTURES = {
    "one value": ("vae_decoder", 128, "the model made a picture of one single value"),
    "NaN": ("unet", float("nan"), "the model made NaN or infinite latents"),
    "infinite": ("unet", float("inf"), "the model made NaN or infinite latents"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_what_is_no_picture_is_never_returned(sd: Path, copy_of, tmp_path: Path, case: str) -> None:
    bundle, (graph, value, expected) = copy_of(sd), PICTURES[case]
    replace(bundle, graph, value)
    with Pipeline.load(bundle) as pipe:
        for output_type in ("pil", "np", "uint8"):
            with pytest.raises(PictureError, match=expected):
                pipe("a cat", seed=0, output_type=output_type)
    said = refused(called("turbochain", "generate", bundle, "a cat", "-o", tmp_path / "out.png"), status=1)
    assert expected in said and f"turbochain verify {bundle}" in said and not (tmp_path / "out.png").exists()
    done = called("turbochain", "verify", bundle)
    assert done.returncode == 1 and f"{graph}: " in done.stderr and "FAILED" in done.stdout
