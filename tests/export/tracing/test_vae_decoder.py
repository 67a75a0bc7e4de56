"""What a family's decoder does with latents is what its diffusers pipeline does, whatever the VAE's config says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SIZE
from test_parity import assert_same_picture, load_diffusers

from turbochain.export import families
from turbochain.export.tracing import modules

MEAN, STD = [0.4, -0.7, 1.1, 0.2], [0.5, 1.8, 0.9, 1.3]
CONFIGS: dict[str, dict[str, Any]] = {
    "neither": {},
    "mean": {"latents_mean": MEAN},
    "std": {"latents_std": STD},
    "both": {"latents_mean": MEAN, "latents_std": STD},
    "shift": {"shift_factor": 0.6},
    "another scale": {"scaling_factor": 0.3, "latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.6},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Any:
    return load_diffusers(checkpoints[request.param])


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_are_decoded_as_the_pipeline_decodes_them(pipe: Any, name: str) -> None:
    settings = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}
    pipe.vae.register_to_config(**settings | CONFIGS[name])
    width, height = SIZE
    latents = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "", "num_inference_steps": 1, "guidance_scale": 0.0, "width": width, "height": height}
    with torch.inference_mode():
        picture = pipe(**call, latents=latents.clone()).images[0]
        decoded = pipe(**call, latents=latents.clone(), output_type="latent").images
        family = families.of(type(pipe).__name__)
        module = getattr(modules, family.graphs["vae_decoder"].module)(pipe.vae)
        ours = module(decoded).numpy()
    assert np.asarray(picture).std() > 5, "the picture was to show something"
    assert_same_picture(ours, np.asarray(picture)[None])


def test_the_configs_make_other_pictures_where_the_pipeline_reads_them(pipe: Any) -> None:
    """Or the test above could not fail."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}
    family, found = families.of(type(pipe).__name__), {}
    for name, config in CONFIGS.items():
        pipe.vae.register_to_config(**settings | config)
        with torch.inference_mode():
            found[name] = getattr(modules, family.graphs["vae_decoder"].module)(pipe.vae)(latents).numpy()
    assert not np.array_equal(found["neither"], found["another scale"])
    assert np.array_equal(found["neither"], found["both"]) == (family.name == "sd")
