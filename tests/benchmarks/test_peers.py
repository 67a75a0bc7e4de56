"""The peers' strongest settings, tried on a CPU: they reach PyTorch, and the pictures stay right."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BundleFactory
from diffusers import EulerDiscreteScheduler

import contenders
import cpu_peers
import figures
import peers
import product
from turbochain.export.sources.checkpoint import open_folder

PROMPTS, SEED = ["a photo of a cat"], 0
DTYPES = {"bf16": torch.bfloat16, "rescaled": torch.float16}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """PyTorch's settings as they were; its graphs are not compiled, which takes a minute."""
    settings, grad = torch._inductor.config, torch.is_grad_enabled()
    with settings.patch({name: getattr(settings, name) for name in peers.INDUCTOR}), pytest.MonkeyPatch.context() as m:
        m.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        m.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        with torch.compiler.set_stance("force_eager"):
            yield
    torch.set_grad_enabled(grad)


def load(name: str, checkpoint: Path, exponents: dict[str, int] | None = None, **changed: Any) -> Any:
    """The peer of this name on the CPU, where fp16 takes the place of what a GPU computes in."""
    spec = asdict(replace(contenders.find(name), **changed))
    where = {"source": str(checkpoint), "variant": None, "device": "cpu", "size": (64, 64), "batch": 1}
    return peers.KINDS[spec["kind"]]({**spec, **where, "exponents": exponents or {}})


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> dict[str, np.ndarray]:
    """Family → diffusers' own picture in fp32."""
    return {f: load("eager-fp32", path).draw(PROMPTS, SEED, 1) for f, path in checkpoints.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("vae", ["bf16", "rescaled"])
def test_another_vae_is_in_its_precision_and_makes_the_picture(
    checkpoints: dict[str, Path], reference: dict[str, np.ndarray], family: str, vae: str
) -> None:
    exponents = {"decoder.conv_in": 3, "decoder.up_blocks.3.resnets.0.conv1": 2} if vae == "rescaled" else None
    peer = load(f"eager-fp16-tuned+{vae}-vae", checkpoints[family], exponents)
    assert peer.pipe.vae.dtype == DTYPES[vae] and peer.pipe.unet.dtype == torch.float16 and not peer.upcast
    assert peer.precision["vae_decoder"] == {"rescaled": "fp16"}.get(vae, vae) and peer.precision["unet"] == "fp16"
    assert figures.check(peer.draw(PROMPTS, SEED, 1), reference[family], "fp16").passed
    assert peer.pipe.vae.dtype == DTYPES[vae]  # it was not moved to fp32 for the call
    assert product.upcasts(open_folder(checkpoints[family])) == (family == "sdxl")
    as_diffusers_has_it = load("eager-fp16-tuned", checkpoints[family])
    assert as_diffusers_has_it.precision["vae_decoder"] == ("fp32" if family == "sdxl" else "fp16")
    if exponents:
        own = as_diffusers_has_it.pipe.vae.decoder.conv_in.weight
        torch.testing.assert_close(peer.pipe.vae.decoder.conv_in.weight, own / 8, rtol=0, atol=1e-6)


def test_tuned_settings_reach_pytorch(checkpoints: dict[str, Path], reference: dict[str, np.ndarray]) -> None:
    torch.backends.cudnn.benchmark = False
    plain = load("eager-fp16", checkpoints["sd"])
    assert not torch.backends.cudnn.benchmark and not _channels_last(plain.pipe.unet)
    tuned = load("eager-fp16-tuned", checkpoints["sd"], precision="fp32")
    assert torch.backends.cudnn.benchmark and _channels_last(tuned.pipe.unet) and _channels_last(tuned.pipe.vae)
    np.testing.assert_allclose(tuned.draw(PROMPTS, SEED, 1).astype(int), reference["sd"].astype(int), atol=1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_compiled_has_the_settings_of_the_guide(
    checkpoints: dict[str, Path], reference: dict[str, np.ndarray], family: str
) -> None:
    peer = load("compiled-fp16", checkpoints[family], precision="fp32")
    settings = torch._inductor.config
    assert settings.conv_1x1_as_mm and settings.coordinate_descent_tuning and not settings.epilogue_fusion
    assert settings.coordinate_descent_check_all_directions
    fused = {name for name, _ in peer.pipe.unet.named_modules() if name.rpartition(".")[2] in ("to_qkv", "to_kv")}
    attentions = [m for m in peer.pipe.unet.modules() if type(m).__name__ == "Attention"]
    assert len(fused) == len(attentions) > 0  # to_qkv of self-attention, to_kv of the others
    assert hasattr(peer.pipe.vae.decoder.mid_block.attentions[0], "to_qkv")
    np.testing.assert_allclose(peer.draw(PROMPTS, SEED, 1).astype(int), reference[family].astype(int), atol=1)


def test_a_tiny_vae_has_no_attention_to_fuse(
    checkpoints: dict[str, Path], tmp_path: Path, reference: dict[str, np.ndarray]
) -> None:
    own = open_folder(checkpoints["sd"])
    (tmp_path / own.folder.name).symlink_to(own.folder)
    made = product.with_vae(own, "synthetic:sd-turbo-mini", "tiny", tmp_path)
    picture = load("compiled-fp16", made.folder, precision="fp32").draw(PROMPTS, SEED, 1)
    assert picture.shape == reference["sd"].shape and picture.std() > 0


def test_what_rescales_the_vae_is_what_the_export_decided(bundle_of: BundleFactory) -> None:
    assert product.vae_exponents(bundle_of("sd", precision="fp16")) == {}  # random weights stay in range


def _channels_last(module: torch.nn.Module) -> bool:
    weights = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_steps_of_a_peer_are_those_of_diffusers_scheduler(checkpoints: dict[str, Path], steps: int) -> None:
    scheduler = EulerDiscreteScheduler.from_pretrained(checkpoints["sd"] / "scheduler")
    scheduler.set_timesteps(steps)
    found = cpu_peers.sigmas(dict(scheduler.config) | {"_class_name": "EulerDiscreteScheduler"}, steps)
    np.testing.assert_allclose(found, scheduler.sigmas.numpy(), rtol=1e-5)


def test_a_peer_with_other_steps_is_left_out() -> None:
    with pytest.raises(RuntimeError, match="left out"):
        cpu_peers.sigmas({"_class_name": "PNDMScheduler"}, 1)
