"""LCM_Dreamshaper and its kin: the parts of Stable Diffusion, a UNet that reads the guidance scale, own pipelines."""

from dataclasses import replace

from turbochain.export.families import sd
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE

FAMILY = replace(
    sd.FAMILY,
    name="lcm",
    title="LCM_Dreamshaper",
    pipelines={
        TEXT_TO_IMAGE: "LatentConsistencyModelPipeline",
        IMAGE_TO_IMAGE: "LatentConsistencyModelImg2ImgPipeline",
    },
    kin=(),
    strength_sets_timesteps=True,
    steered={},
)
