"""A clone without Git LFS: pointers in place of files are refused, with the way to fetch them.

The pointers are of the format's specification (git-lfs, docs/spec.md).
"""

import hashlib
import shutil
from pathlib import Path

import pytest
from conftest import ON_ARGUMENTS, called

WEIGHTS = ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")
CHECKPOINT = {
    "weights": (WEIGHTS[1],),
    "several weights": WEIGHTS,
    "tokenizer": ("tokenizer/vocab.json",),
    "vocabulary": ("tokenizer/merges.txt",),
    "config": ("vae/config.json",),
    "index": ("model_index.json",),
    "scheduler": ("scheduler/scheduler_config.json",),
}
BUNDLE = {
    "weights": "graphs/unet.fp32-0.data",
    "graph": "graphs/unet.onnx",
    "tokenizer": "tokenizer.json",
    "tables": "tables/text-to-image.safetensors",
    "manifest": "bundle.json",
}


def replace(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{hashlib.sha256(data).hexdigest()}")
    file.write_text("\n".join((*lines, f"size {len(data)}\n")))


@pytest.mark.parametrize("case", CHECKPOINT)
def test_a_checkpoint(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, pointers = shutil.copytree(checkpoints["sd"], tmp_path / "the checkpoint"), CHECKPOINT[case]
    for name in pointers:
        replace(source / name)
    done = called("build-engine", source, "-o", tmp_path / "a.bundle", *ON_ARGUMENTS)
    more = f" (and {len(pointers) - 1} more)" if pointers[1:] else ""
    first = source / pointers[0]
    assert f"error: {first}{more} is a Git LFS pointer, not the file itself. Fetch the files: " in done.stderr
    assert done.stderr.endswith(f"git lfs install && git -C '{first.parent}' lfs pull\n") and done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_vae(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    vae = shutil.copytree(checkpoints["sd"] / "vae", tmp_path / "vae")
    replace(vae / "diffusion_pytorch_model.safetensors")
    done = called("build-engine", checkpoints["sd"], "-o", tmp_path / "a.bundle", "--vae", vae, *ON_ARGUMENTS)
    assert f"{vae}/diffusion_pytorch_model.safetensors is a Git LFS pointer" in done.stderr and done.returncode == 2


@pytest.mark.parametrize("case", BUNDLE)
def test_a_bundle(case: str, sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    replace(bundle / BUNDLE[case])
    for line in (["generate", bundle, "a cat"], ["verify", bundle]):
        done = called("turbochain", *line)
        assert "is a Git LFS pointer, not the file itself" in done.stderr and BUNDLE[case] in done.stderr
        assert done.stderr.endswith(f"git lfs install && git -C {bundle} lfs pull\n") and done.returncode == 2


def test_a_truncated_file_is_no_pointer(sd: Path, copy_of) -> None:
    bundle = copy_of(sd)
    (bundle / "tokenizer.json").write_text("version https://git-lfs")
    done = called("turbochain", "generate", bundle, "a cat")
    assert "'tokenizer.json' is truncated" in done.stderr and "LFS" not in done.stderr
