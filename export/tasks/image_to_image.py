"""Image-to-image: the loop begins with an image that is as noisy as `strength` says."""

from turbochain.export.tasks import Task
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, Draw, Feed, Stage

BEFORE = (Stage("vae_encoder", "image", "image_latents"), Stage("start", "image", "state"))
FEEDS = {
    "input_image": Feed("image", "call"),
    "posterior_noise": Feed("noise", "call"),
    "start_noise": Feed("noise", "call"),
    "p": Feed("column", "call"),
    "q": Feed("column", "call"),
}

TASK = Task(
    name=IMAGE_TO_IMAGE,
    before=BEFORE,
    feeds=FEEDS,
    draws=(Draw("posterior_noise", "image"), Draw("start_noise", "picture")),
    starts_late=True,
)
