"""Parts, schedulers, timesteps and recipes that cannot be: one sentence for each, and nothing is written."""

from pathlib import Path

import pytest
from conftest import ON_ARGUMENTS, called
from here import phases_here
from refusals import refused

from turbochain.engines import build
from turbochain.export.sources.kinds.demo import FOLDER as DEMO
from turbochain.runtime import InputError


def test_one_value_where_several_can_be() -> None:
    for options, expected in (
        ({"lora": "a/b/c.safetensors"}, r"lora 'a/b/c\.safetensors': a list was expected, such as \['a/b/c"),
        ({"steps": 4}, r"steps 4: a list was expected, such as \[4\]"),
        ({"size": "512x512"}, r"size '512x512': \(width, height\) was expected"),
    ):
        with pytest.raises(InputError, match=expected):
            build("demo", **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--recipe", "turbo"], "there is no recipe 'turbo': choose sdxl-lightning-1step, "),
        (["demo", "--scheduler", "{trailing}"], "--scheduler {trailing}: a class of diffusers, such as DDIMScheduler"),
        (["demo", "--scheduler", "[1]"], "or a JSON object of changes to its config was expected"),
        (
            ["demo", "--scheduler", "EulerScheduler"],
            "--scheduler EulerScheduler: diffusers exports no scheduler of this",
        ),
        (
            ["demo", "--scheduler", "UNet2DModel"],
            "--scheduler UNet2DModel: diffusers exports no scheduler of this name",
        ),
        (
            ["demo", "--scheduler", '{"spacing": "trailing"}'],
            "--scheduler: EulerDiscreteScheduler has no spacing: it has",
        ),
        (["demo", "--timesteps", "999,800,900"], "1 to 50 descending numbers from 0 were expected"),
        (["demo", "--timesteps", "a"], "--timesteps a: a list was expected, such as 999,749,499,249"),
        (["demo", "--timesteps", "9,1", "--steps", "1-4"], "2 timesteps are 2 steps, so leave steps out"),
        (
            ["demo", "--timesteps", "1000"],
            "has timesteps up to 999, for which the network was trained, and timesteps=[1000]",
        ),
        (["demo", "--steps", ""], "--steps : a range or a list was expected"),
        (["demo", "--batch", ""], "--batch : a number was expected"),
        (["demo", "--tasks", ""], "task '': choose from"),
        (["demo", "--recipe", ""], "there is no recipe '': choose"),
        (
            ["demo", "--chains", "a"],
            "there is no chain a in demo.bundle: choose --chains from text-to-image, image-to-im",
        ),
        (["demo", "--revision", "main"], "--revision main is for a hub id, and demo is none: leave it out"),
        (["demo", "--guidance-scales", "1,2"], "guidance_scales: a UNet that reads the guidance scale was expected"),
        (
            ["demo", "--guidance-scale", "3", "--guidance-scales", "1,2"],
            "3: one of the guidance scales 1, 2 was expected",
        ),
        (
            ["demo", "--strengths", "0.5"],
            "strengths: image-to-image of LatentConsistencyModelImg2ImgPipeline was expected",
        ),
        (["demo", "--scheduler", '{"beta_start": "x"}'], "EulerDiscreteScheduler fails with these values ("),
        (
            ["demo", "--vae", str(DEMO)],
            "is a whole checkpoint, and the folder of one component was expected: give one",
        ),
        (["demo", "--lora", str(DEMO / "vae/diffusion_pytorch_model.safetensors")], f"{DEMO}/vae/diffusion_pytorch_mo"),
        (["demo", "--eta", "2"], "eta 2.0: a number from 0 to 1 was expected"),
        (
            ["synthetic:lcm-sd15-mini", "--scheduler", "EulerDiscreteScheduler", "--tasks", "text-to-image"],
            "the scheduler EulerDiscreteScheduler takes no original_inference_steps, and one that does was expected",
        ),
        (["demo", "--eta", "1"], "the scheduler EulerDiscreteScheduler takes no eta, and"),
        (
            ["demo", "--lora", "a/b/c.safetensors:x"],
            "a number was expected after the colon, such as a/b/c.safetensors:0.8",
        ),
        (["demo", "--lora", "."], "is a folder, and a .safetensors file was expected: name the one in it"),
        (
            ["demo", "--unet", "nothing"],
            "--unet nothing is neither a .safetensors file here, nor a file of the hub (owner",
        ),
        (
            ["demo", "--unet", "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin"],
            "is a pickle, and a .safetensors file was expected because loading a pickle runs code: take the LoRA or "
            "the UNet that tianweiy/DMD2 has as one (for DMD2: --recipe dmd2-4step)",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: list[str], sentence: str, tmp_path: Path) -> None:
    with phases_here():
        done = called("build-engine", *options, *ON_ARGUMENTS, cwd=tmp_path)
    assert sentence in refused(done)
    assert not list(tmp_path.iterdir())
