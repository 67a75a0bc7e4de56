"""Full size on a real GPU: the same picture as diffusers in fp32 and in fp16 there.

TURBOCHAIN_GPU_BUNDLES names a folder in which checkpoints and bundles are kept between runs (building takes minutes).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from turbochain.engines import build
from turbochain.export.sources import synthetic
from turbochain.runtime import Pipeline

pytestmark = pytest.mark.gpu

PRESETS = ("sd-turbo", "sdxl-turbo")
SEEDS = (0, 1, 42, 2**32 + 5, 2**64 - 1)
PROMPTS = ("a photo of a cat wearing a red hat, studio light", "", "窓辺に座っている小さな猫の写真")
PSNR, SSIM = 38.0, 0.98  # the design's bounds of a whole fp16 picture


@pytest.fixture(scope="module", params=PRESETS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A full-size checkpoint with random weights, and its bundle with a TensorRT engine of this GPU."""
    kept = os.environ.get("TURBOCHAIN_GPU_BUNDLES")
    root = Path(kept) if kept else tmp_path_factory.getbasetemp()
    checkpoint, bundle = root / request.param, root / f"{request.param}.bundle"
    if not (checkpoint / "model_index.json").exists():
        synthetic.write_checkpoint(request.param, checkpoint)
    build(str(checkpoint), bundle, backend="tensorrt", quiet=True)
    return checkpoint, bundle


@pytest.fixture(scope="module")
def ours(folders: tuple[Path, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(folders[1], backend="tensorrt") as pipe:
        yield pipe


@pytest.fixture(scope="module", params=["float32", "float16"])
def theirs(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Iterator[Any]:
    """diffusers' pipeline on the GPU, in fp32 without TF32, or in fp16."""
    from diffusers import DiffusionPipeline

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = DiffusionPipeline.from_pretrained(folders[0], torch_dtype=getattr(torch, request.param)).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.to("cpu")  # pytest holds it to the end
    torch.cuda.empty_cache()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_picture_is_diffusers(ours: Pipeline, theirs: Any, steps: int) -> None:
    for seed in SEEDS:
        for prompt in PROMPTS:
            expected = theirs(
                prompt,
                num_inference_steps=steps,
                guidance_scale=0.0,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="pil",
            ).images[0]
            output = ours(prompt, num_inference_steps=steps, seed=seed, output_type="uint8")
            (made,), wanted = output.images, np.asarray(expected)
            assert output.uncaptured is None
            assert peak_signal_noise_ratio(wanted, made) >= PSNR, (seed, prompt)
            assert structural_similarity(wanted, made, channel_axis=2) >= SSIM, (seed, prompt)
