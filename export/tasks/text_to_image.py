"""Text-to-image: the loop begins with noise."""

from turbochain.export.tasks import Task
from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE, Draw, Feed

TASK = Task(
    name=TEXT_TO_IMAGE,
    feeds={"latents": Feed("noise", "call", scale="init_noise_sigma")},
    draws=(Draw("latents", "picture"),),
)
