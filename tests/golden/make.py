"""Make the golden bundle again: `python tests/golden/make.py`. Only for a change of the format; the files are
committed.

A Stable Diffusion checkpoint of the true classes with a few thousand random parameters and a multistep sampler that
draws noise in every step (SDE-DPM++ 2M: two tensors go round the loop), for text-to-image and image-to-image, so that
the bundle has something of everything.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from turbochain.export import export

HERE = Path(__file__).parent
BUNDLE = HERE / "bundle"
TOKENIZER = HERE.parents[1] / "export/demo/tokenizer"


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint in diffusers' format."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),  # attention is in the middle
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(2, 2, 2, 2),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=1,
    )
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nRandom weights, for turbochain's tests.\n")


def main() -> None:
    """Write the checkpoint into a temporary folder and export it over the committed bundle."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "golden"
        write_checkpoint(checkpoint)
        made = export(str(checkpoint), Path(temporary) / "golden.bundle", size=(32, 32), steps=[1, 3])
        shutil.rmtree(BUNDLE, ignore_errors=True)
        shutil.copytree(made, BUNDLE, ignore=shutil.ignore_patterns("source.json"))  # no part of the bundle


if __name__ == "__main__":
    main()
