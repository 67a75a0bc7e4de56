"""A stream of camera frames: image-to-image, in which one launch of the UNet makes a row for each of several frames."""

from turbochain.export.tasks import Task
from turbochain.export.tasks.image_to_image import BEFORE, FEEDS
from turbochain.export.tasks.image_to_image import TASK as OF_ONE_IMAGE
from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, STREAM

TASK = Task(
    name=STREAM,
    before=BEFORE,
    feeds=FEEDS,
    draws=OF_ONE_IMAGE.draws,
    starts_late=True,
    of=IMAGE_TO_IMAGE,
    streams=True,
)
