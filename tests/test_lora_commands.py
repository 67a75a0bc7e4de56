"""LoRA files on the command line: generate, verify, and adapter convert."""

import json
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
from conftest import called
from PIL import Image
from safetensors import safe_open
from test_lora_patch import CALL, load
from test_lora_slots import draw

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing, names
from turbochain.runtime.inputs import adapter_files, adapters

ON = ("--backend", "onnxruntime", "--device", "cpu", "--chain", "text-to-image")


def test_a_converted_file_is_the_same_adapter(slotted: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With the names of the checkpoint, and where it came from; float16 stays float16."""
    layers = draw(checkpoints["sd"], seed=5, alphas=(0.3,), dtype=torch.float16)
    source, target = lora_files.write(tmp_path / "k.safetensors", layers, "kohya"), tmp_path / "n.safetensors"
    done = called("turbochain", "adapter", "convert", source, slotted, "-o", target, "--license", "openrail++")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{target}: ")
    known = names.shapes(Bundle.open(slotted))
    before, after = (adapters.read(path, known).components for path in (source, target))
    assert before.keys() == after.keys()
    for component, added in before.items():
        assert added.keys() == after[component].keys()
        for name, one in added.items():
            other = after[component][name]
            assert other.scale == one.scale and other.down.dtype == other.up.dtype == np.float16
            np.testing.assert_array_equal(other.down, one.down)
            np.testing.assert_array_equal(other.up, one.up)
    with safe_open(target, "numpy") as file:
        told = json.loads(file.metadata()["turbochain_adapter"])
    base = Bundle.open(slotted).manifest.checkpoint.source
    digest = hashing.digest(source)
    assert told == {"source": "k.safetensors", "sha256": digest, "base": base, "license": "openrail++"}
    again = tmp_path / "again.safetensors"
    adapter_files.write(adapters.read(target, known), again, base, None)
    assert adapter_files.origin(again) == adapter_files.AdapterOrigin(**told)  # not where the converted file is
    with load(slotted) as pipe:
        made = []
        for path in (source, target):
            pipe.load_lora_weights(path)
            made.append(pipe(**CALL).images)
    np.testing.assert_array_equal(*made)


def test_generate_draws_with_several(slotted: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    files = [
        lora_files.write(tmp_path / f"{n}.safetensors", draw(checkpoints["sd"], seed=n, only="to_q"), "peft")
        for n in (1, 2)
    ]
    loras = ("--lora", files[0], "--lora", f"{files[1]}:-0.5")
    call = (slotted, CALL["prompt"], *ON, "--steps", 2, "--seed", 3, "-o", tmp_path / "x.png")
    assert called("turbochain", "generate", *call, *loras).returncode == 0
    with load(slotted) as pipe:
        for name, file in zip("ab", files, strict=True):
            pipe.load_lora_weights(file, adapter_name=name)
        pipe.set_adapters(["a", "b"], [1.0, -0.5])
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), pipe(**CALL).images[0])


def checks(*arguments: Any, on: tuple[str, ...] = ON) -> dict[str, list[dict[str, Any]]]:
    done = called("turbochain", "verify", *arguments, *on, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)["checks"]
    return found


def test_verify_compares_with_what_was_recorded_with_the_file(
    slotted: Path, reference_lora: Path, tmp_path: Path
) -> None:
    """Each stage with its slots filled, and the picture; the file may have been converted."""
    converted = tmp_path / "converted.safetensors"
    assert called("turbochain", "adapter", "convert", reference_lora, slotted, "-o", converted).returncode == 0
    for file, on in ((reference_lora, ON[:4]), (converted, ON)):
        found = checks(slotted, "--lora", f"{file}:0.8", on=on)
        for chain, of_chain in found.items():
            assert {c["stage"] for c in of_chain} >= {"text_encoder", "unet+lora", "image"}, chain
            assert "unet" not in {c["stage"] for c in of_chain}
    told = json.loads(called("turbochain", "verify", slotted, *ON, "--lora", reference_lora, "--json").stdout)
    assert not any(told["checks"].values()) and told["note"].startswith("not compared with diffusers")
    done = called("turbochain", "verify", slotted, *ON, "--lora", reference_lora)
    assert done.returncode == 0 and "not compared with diffusers: no call with these LoRA files" in done.stdout


def test_an_ordinary_verification_has_the_graphs_with_slots_too(slotted: Path) -> None:
    for of_chain in checks(slotted).values():
        figures = {(c["stage"], c["metric"]): c["value"] for c in of_chain}
        assert figures["unet+lora", "relative_l2"] == figures["unet", "relative_l2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "BUNDLE", "x", "--lora", "x.safetensors:much"), "a number was expected after the colon"),
        (("generate", "BUNDLE", "x", "--lora", "none.safetensors"), "none.safetensors is missing"),
        (("adapter", "convert", "none.safetensors", "BUNDLE", "-o", "x.safetensors"), "none.safetensors is missing"),
        (("adapter", "convert", "none.safetensors", "BUNDLE", "-o", "x.bin"), "ends in .safetensors"),
    ],
)
def test_what_is_refused(slotted: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    words = [slotted if word == "BUNDLE" else word for word in arguments]
    done = called("turbochain", *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
