"""Which chain of a bundle suits a call."""

import numpy as np

from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.inputs.numbers import is_whole
from turbochain.runtime.inputs.pictures import side, wanted_size


def chain_of(
    bundle: Bundle,
    count: int = 1,
    *,
    image: object = None,
    mask_image: object = None,
    control_image: object = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """Return the chain for a call's arguments: for their task and size, with the fewest pictures per pass that are
    enough.

    `count`: how many pictures the call makes. Without `height` and `width` an image, or without one the control image,
    has its own size if the task is built for it (each side rounded down to a multiple of 8), else that of the task's
    first chain. Raises InputError if
    the bundle has no chain for the task or the size.
    """
    task = task_of(image, mask_image)
    sizes = bundle.sizes(task)
    size = asked_size(sizes[0], height, width)
    argument, given = ("control_image", control_image) if image is None else ("image", image)
    if given is not None and height is None and width is None and (own := wanted_size(argument, given)) in sizes:
        size = own
    return bundle.find_chain(task, size, count)


def task_of(image: object, mask_image: object) -> str:
    """Return the task of a call's arguments."""
    return INPAINTING if mask_image is not None else IMAGE_TO_IMAGE if image is not None else TEXT_TO_IMAGE


def asked_size(first: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """Return the height and width that a call asks for, those of `first` if it gives none. Raises InputError."""
    return side("height", height, first[0]), side("width", width, first[1])


def pictures_of(prompt: object, prompt_embeds: object, repeats: object) -> int:
    """Return how many pictures a call makes; its arguments need not have been checked."""
    given, prompts = prompt_embeds if prompt is None else prompt, 1
    if isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim):
        prompts = len(given)
    return prompts * (repeats if is_whole(repeats) else 1)
