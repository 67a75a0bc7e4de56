"""Inpainting: image-to-image that puts back, after every step, what the mask keeps of the image."""

from turbochain.export.tasks import Task
from turbochain.export.tasks.image_to_image import BEFORE, FEEDS
from turbochain.runtime.bundle.manifest import INPAINTING, Draw, Feed, Stage

TASK = Task(
    name=INPAINTING,
    before=BEFORE,
    after_step=(Stage("blend", "step", "state"),),
    feeds={
        **FEEDS,
        "mask": Feed("mask", "call"),
        "next_p": Feed("column", "step"),
        "next_q": Feed("column", "step"),
    },
    draws=(
        Draw("posterior_noise", "image_alone"),
        Draw("start_noise", "picture"),
        # diffusers encodes the masked image too, for UNets that read it, and this one does not.
        Draw("posterior_noise", "masked_image", discarded=True),
    ),
    latents="blended_latents",
    starts_late=True,
    plain_latents=True,
    whole_is_noise=True,
)
