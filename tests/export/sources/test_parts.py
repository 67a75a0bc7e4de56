"""Parts that replace a checkpoint's own (`--vae`), against diffusers with the same one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ON, SIZE, called
from diffusers import AutoencoderTiny
from here import build_here
from refusals import refused
from test_parity import assert_same_picture, load_diffusers, theirs

from turbochain.engines import build
from turbochain.export import jobs
from turbochain.export.order import ExportOrder
from turbochain.export.prepared import Prepared
from turbochain.export.sources import Want, find, parts
from turbochain.runtime import Bundle, InputError, Pipeline
from turbochain.runtime.backends import openvino
from turbochain.runtime.bundle.strict_json import convert, plain
from turbochain.runtime.checks.bounds import BOUNDS

CALL = {"prompt": "a cat in the snow", "num_inference_steps": 2, "seed": 3}
TINY = {"sd": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an AutoencoderTiny with a licence of its own."""
    folder = tmp_path_factory.mktemp("tiny") / "our-tiny"
    torch.manual_seed(0)
    channels = {f"{part}_block_out_channels": (16,) * 4 for part in ("encoder", "decoder")}
    AutoencoderTiny(**channels, scaling_factor=0.5).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_it_is_diffusers_picture_with_that_vae(
    checkpoints: dict[str, Path], sd: Path, tiny: Path, tmp_path: Path
) -> None:
    bundle, vae = tmp_path / "a.bundle", tmp_path / "our-tiny"
    shutil.copytree(tiny, vae)
    asked = {"vae": str(vae), "size": SIZE, "steps": [2], "quiet": True, **ON}
    made = build_here(str(checkpoints["sd"]), bundle, **asked)
    assert made.remedy["vae_decoder"] == made.remedy["vae_encoder"] == ""
    assert {*made.checks} == {"text-to-image", "image-to-image"}  # whose image has no posterior here
    assert all(check.passed for checks in made.checks.values() for check in checks)
    pipe = load_diffusers(checkpoints["sd"])
    pipe.vae = AutoencoderTiny.from_pretrained(vae)
    with Pipeline.load(bundle) as ours:
        assert_same_picture(ours(**CALL, output_type="uint8").images, theirs(pipe, CALL))
    manifest = Bundle.open(bundle).manifest
    assert manifest.request["vae"] == "a folder"
    assert {name: graph.model_class for name, graph in manifest.graphs.items()} == {
        "text_encoder": "CLIPTextModel",
        **dict.fromkeys(("start", "step", "step+guidance"), ""),
        "unet": "UNet2DConditionModel",
        "vae_decoder": "AutoencoderTiny",
        "vae_encoder": "AutoencoderTiny",
    }
    (weights,) = manifest.checkpoint.parts["vae"].weights.values()
    assert weights.size == (vae / "diffusion_pytorch_model.safetensors").stat().st_size
    told = {name: (part.source, part.license) for name, part in manifest.checkpoint.parts.items()}
    own = (checkpoints["sd"].name, "apache-2.0")
    others = dict.fromkeys(("text_encoder", "unet", "tokenizer", "scheduler"), own)
    assert told == {**others, "vae": ("our-tiny", "mit")}
    assert manifest.checkpoint.parts["vae"].terms == ("vae-README.md",)
    inspected = called("turbochain", "inspect", bundle)
    assert "vae from our-tiny" in inspected.stdout and "vae: mit" in inspected.stdout
    assert (bundle / "vae-README.md").read_text() == (vae / "README.md").read_text()
    assert build_here(str(checkpoints["sd"]), bundle, **asked).phases == []
    if openvino.has_bf16():
        options = {"inference_precision": "bf16"}
        made = build_here(str(bundle), backend="openvino", options=options, chains=["text-to-image"], quiet=True)
        bounds = {c.stage: c.bound for c in made.checks["text-to-image"]}
        assert bounds["vae_decoder"] == BOUNDS["bf16"]["AutoencoderTiny"]["psnr"]
    with pytest.raises(InputError, match="vae is 'a folder' there and 'tiny' here"):
        build(str(bundle), bundle, vae="tiny", quiet=True, **ON)
    copy = shutil.copytree(vae, tmp_path / "a-copy", copy_function=shutil.copyfile)
    assert build(str(checkpoints["sd"]), bundle, **{**asked, "vae": str(copy)}).phases == []
    (copy / "config.json").open("a").write("\n")
    for source in (checkpoints["sd"], bundle):
        with pytest.raises(InputError, match=r"files of the source have changed: vae/config\.json\)"):
            build(str(source), bundle, **{**asked, "vae": str(copy)})


def test_a_synthetic_checkpoint_has_a_tiny_one(tmp_path: Path) -> None:
    order = ExportOrder("synthetic:sdxl-turbo-mini", vae="tiny", sizes=(SIZE,), steps=(1,))
    prepared = jobs.prepare(print, order=order, requested=order.requested("fp32"), folder=tmp_path, force=False)
    vae = AutoencoderTiny.from_pretrained(prepared.checkpoint.parts["vae"].folder)
    with torch.inference_mode():
        picture = vae.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))).sample
    assert picture.shape == (1, 3, 64, 64) and 0.1 < picture.std() < 1 and (picture.abs() < 1).float().mean() > 0.7
    (weights,) = prepared.origin.parts["vae"].weights.values()
    assert weights.size < 2**20
    assert convert(Prepared, plain(prepared)) == prepared


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_is_the_familys_own(family: str, checkpoints: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """Its repository, as the hub's cache has it, with no network."""
    cache, commit = tmp_path / f"models--{TINY[family].replace('/', '--')}", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    shutil.copytree(tiny, cache / "snapshots" / commit)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = (
        "import sys, pathlib; from turbochain.export.sources import Want, find, parts\n"
        "checkpoint = parts.fetch(find(sys.argv[1]), Want(pathlib.Path()), {'vae': 'tiny'})\n"
        "print(checkpoint.parts['vae'].folder, checkpoint.parts['vae'].revision)"
    )
    line = [sys.executable, "-c", code, checkpoints[family]]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [str(cache / "snapshots" / commit), commit], done
    shutil.rmtree(cache)
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=100)
    assert f"{TINY[family]} is neither on the hub under that name nor in the local cache" in done.stderr


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (
            "nothing",
            "--vae nothing is neither tiny, nor a .safetensors file here, nor a file of the hub (owner",
        ),
        ("unet", "--vae unet: its config.json is of UNet2DConditionModel, and AutoencoderTiny or AutoencoderKL was"),
        ("tokenizer", "tokenizer/config.json cannot be read"),
        ("tiny", "--vae tiny: madebyollin/taesd decodes latents whose scaling_factor is 0.18215, and the VAE of"),
    ],
)
def test_what_is_no_vae(
    vae: str, message: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoints["sd"])
    with pytest.raises(InputError, match=re.escape(message)):
        parts.fetch(find("demo" if vae == "tiny" else str(checkpoints["sd"])), Want(tmp_path), {"vae": vae})


def test_the_command_says_so_and_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    done = called("build-engine", checkpoints["sd"], "-o", tmp_path / "a.bundle", "--vae", "nothing")
    assert "--vae nothing is neither tiny, nor a .safetensors file here, nor a file of the hub (owner" in refused(done)
    assert not list(tmp_path.iterdir())
