"""Pictures that a caller gives, and masks: what diffusers' `load_image` and `VaeImageProcessor` make of them.

A picture is a PIL image, of any mode, or an array:

- PIL: turned as its EXIF orientation says, and `convert("RGB")`, as `load_image` does. Transparency is dropped, so that
  the colour that a file keeps under its transparent places appears; a caller that wants another composes it first.
- PIL of 16 bits (I;16, and I if it goes beyond 255, as older versions of Pillow read such a PNG): each value is divided
  by 257 and rounded. PIL's own conversion clips it, and makes most of it white.
- PIL of mode F, and any other of mode I: levels from 0 to 255.
- arrays: uint8 levels, or floats from 0 to 1, of which the level is 255·x rounded (a half to the even level).
  [H, W], [H, W, 1], [H, W, 3], [H, W, 4] (the fourth is alpha, and dropped), or a batch [n, H, W, 1, 3 or 4].

A list or tuple of these, of several sizes too, gives all its pictures. Every one is resized with Lanczos' filter;
diffusers takes the nearest pixel for an array, and is equal if the array has the size already.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from turbochain.runtime.bundle import lfs
from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.numbers import is_whole

if TYPE_CHECKING:
    from PIL import Image

REDUCTION = 8
"""Pixels to a side of a latent."""
_CHANNELS = (1, 3, 4)


def wanted_size(argument: str, given: object) -> tuple[int, int]:
    """Return the height and width that diffusers draws: those of the first picture, floored to a multiple of 8.

    `argument` names it in the messages. Raises InputError if it is no picture, or smaller than 8x8.
    """
    height, width = size_of(argument, given)
    if min(width, height) < REDUCTION:
        raise InputError(
            f"{argument} is {width}x{height}: at least {REDUCTION}x{REDUCTION} was expected; give a larger one"
        )
    return height - height % REDUCTION, width - width % REDUCTION


def side(argument: str, given: object, default: int) -> int:
    """Return a height or width in pixels, `default` for None; InputError unless it is a multiple of 8 above 0."""
    if given is None:
        return default
    if not is_whole(given) or given < REDUCTION or given % REDUCTION:
        raise InputError(
            f"{argument}={given!r}: a multiple of {REDUCTION} in pixels was expected; turbochain inspect shows the "
            "sizes that a bundle is built for"
        )
    return int(given)


def size_of(argument: str, given: object) -> tuple[int, int]:
    """Return the height and width of the first picture. Raises InputError if it is none."""
    width, height = next(_pictures(argument, given)).size
    return height, width


def pixels(argument: str, given: object, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """Return pictures as uint8 levels [n, H, W, 3] of RGB, `size` = (H, W); the array is new.

    In the `mode` "L" they are grey, [n, H, W, 1].
    Raises InputError if one of them is no picture; `argument` names it.
    """
    pictures = (_converted(argument, picture, mode) for picture in _pictures(argument, given))
    array = np.stack([np.asarray(_resized(picture, size)) for picture in pictures])
    return array if array.ndim == 4 else array[..., None]


def levels(argument: str, given: object) -> np.ndarray:
    """Return one picture of its own size as uint8 levels: [H, W] if it is grey, else [H, W, 3] of RGB.

    Raises InputError if it is no picture, or if there are several; `argument` names it.
    """
    first, *more = _pictures(argument, given)
    if more:
        raise InputError(f"{argument} holds {1 + len(more)} pictures: one was expected; give them one after another")
    return np.asarray(_converted(argument, first, "L" if first.mode in ("1", "L", "LA", "F", "I") else "RGB"))


def mask(argument: str, given: object, size: tuple[int, int]) -> np.ndarray:
    """Return masks as fp32 [n, 1, H/8, W/8], `size` = (H, W): 1.0 where a picture is repainted, 0.0 where it is kept.

    1.0 is level 128 and above, in every eighth pixel of the resized grey picture. A mask is anything that a picture can
    be, or an array of bools, and its batch may be [n, H, W]. Raises InputError if one is no mask; `argument` names it.
    """
    pictures = (_resized(picture, size) for picture in _pictures(argument, given, of_masks=True))  # resized in colour
    grey = np.stack([np.asarray(_converted(argument, picture, "L")) for picture in pictures])
    return (grey[:, None, ::REDUCTION, ::REDUCTION] >= 128).astype(np.float32)


def open_picture(path: str | os.PathLike[str]) -> "Image.Image":
    """Return the picture of a file, decoded and turned as its EXIF orientation says.

    Raises InputError if there is no such file, it is no whole picture of a kind that PIL reads, or it is too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(path)
    except UnidentifiedImageError:
        if lfs.is_pointer(path):
            folder = os.path.dirname(os.path.abspath(path))
            raise InputError(f"{path} is a Git LFS pointer, not the file itself. {lfs.remedy(folder)}") from None
        raise InputError(
            f"{path} is no picture that PIL reads: a PNG, JPEG, WebP or the like was expected; convert it to PNG"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): a picture's file was expected; check the path"
        ) from error
    except Image.DecompressionBombError as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{path} is too large ({reason}): a smaller picture was expected; scale it down") from error
    with opened:
        return _upright(str(path), opened)


def _pictures(argument: str, given: object, *, of_masks: bool = False) -> Iterator["Image.Image"]:
    """Yield every picture that was given, upright and with levels from 0 to 255, at least one."""
    from PIL import Image

    several = isinstance(given, list | tuple)
    items: Any = given if several else [given]
    if not items:
        raise InputError(f"{argument} is an empty list: at least one picture was expected; give one")
    for i, item in enumerate(items):
        name = f"{argument}[{i}]" if several else argument
        if isinstance(item, np.ndarray):
            yield from (Image.fromarray(array) for array in _split(name, item, of_masks))
        elif isinstance(item, Image.Image):
            yield _in_levels(name, _upright(name, item))
        else:
            raise InputError(_other(name, item))


def _other(argument: str, item: object) -> str:
    """Return what is wrong with an item that is neither a PIL image nor an array."""
    mend = ""
    if isinstance(item, str | bytes | os.PathLike):
        mend = "; for a file, give PIL.Image.open(path)"
    elif type(item).__module__.startswith("torch"):
        mend = (
            "; for a torch tensor [n, channels, H, W] from 0 to 1, give "
            "tensor.detach().float().cpu().numpy().transpose(0, 2, 3, 1)"
        )
    expected = "a PIL image, an array [H, W, 3], or a list of these was expected"
    return f"{argument} is of type {type(item).__name__}: {expected}{mend}"


def _upright(argument: str, picture: "Image.Image") -> "Image.Image":
    """Return a decoded copy, turned as its EXIF orientation says."""
    from PIL import ImageOps

    if 0 in picture.size:
        raise InputError(
            f"{argument} is a picture of {picture.width}x{picture.height}: at least one pixel was expected"
        )
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # a PIL plugin raises whatever the damaged bytes lead to
        raise InputError(
            f"{argument} cannot be decoded ({error}): a whole picture was expected; save it anew"
        ) from error


def _in_levels(argument: str, picture: "Image.Image") -> "Image.Image":
    """Return a picture of 16 bits (I;16 of either byte order, or I) as L, any other as it is; see the module."""
    from PIL import Image

    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    is_of_16 = picture.mode.startswith("I;16") or (picture.mode == "I" and high > 255)
    top = 65535 if is_of_16 else 255
    if not (low >= 0 and high <= top) or (picture.mode == "F" and 0 < high <= 1):
        raise InputError(
            f"{argument} is a picture of mode {picture.mode} with values from {low:g} to {high:g}: 0 to {top} was "
            "expected; give an array of floats from 0 to 1"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)) if is_of_16 else picture


def _split(argument: str, array: np.ndarray, of_masks: bool) -> Iterator[np.ndarray]:
    """Yield the pictures of an array as uint8 levels, [H, W] or [H, W, 3 or 4]."""
    shape = list(array.shape)
    channels = array.ndim > 2 and shape[-1] in _CHANNELS
    rank = array.ndim - channels
    if rank not in (2, 3) or (rank == 3 and not channels and not of_masks):
        batch = "[n, H, W]" if of_masks else "[n, H, W, 3]"
        channels_first = array.ndim > 2 and shape[-3] in _CHANNELS
        mend = f"; give np.moveaxis({argument}, -3, -1)" if channels_first else ""
        raise InputError(
            f"{argument} has the shape {shape}: [H, W], [H, W, 3], [H, W, 4] or {batch} was expected{mend}"
        )
    if 0 in shape:
        raise InputError(f"{argument} has the shape {shape}: at least one picture of one pixel was expected")
    found = _as_levels(argument, array, of_masks)
    found = found[..., 0] if channels and shape[-1] == 1 else found
    yield from found if rank == 3 else [found]


def _as_levels(argument: str, array: np.ndarray, of_masks: bool) -> np.ndarray:
    """Return uint8 levels for levels, floats from 0 to 1 and, of masks, bools."""
    if of_masks and array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype == np.uint8:
        if of_masks and array.max() == 1:  # 1 of 255 is black, which nobody means
            raise InputError(
                f"{argument} is uint8 with values from 0 to 1: 0 to 255 was expected; give {argument}.astype(bool)"
            )
        return array
    if array.dtype.kind != "f":
        more = ", or bools" if of_masks else ""
        raise InputError(
            f"{argument} is an array of {array.dtype}: uint8 from 0 to 255, or floats from 0 to 1{more}, was expected; "
            f"give {argument}.astype(np.uint8) if its values are from 0 to 255"
        )
    if not np.isfinite(array).all():
        raise InputError(
            f"{argument} holds NaN or infinite values: floats from 0 to 1 were expected; mend what made it"
        )
    low, high = array.min(), array.max()
    if low < 0 or high > 1:
        raise InputError(
            f"{argument} holds floats from {low:g} to {high:g}: 0 to 1 was expected; give {argument} / 255 if they are "
            f"levels, ({argument} + 1) / 2 if they are meant from -1 to 1"
        )
    return np.rint(255 * array).astype(np.uint8)


def _converted(argument: str, picture: "Image.Image", mode: str) -> "Image.Image":
    try:
        return picture.convert(mode)
    except ValueError as error:
        raise InputError(
            f"{argument} is a picture of mode {picture.mode} ({error}): RGB was expected; convert it first"
        ) from error


def _resized(picture: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL import Image

    return picture.resize(size[::-1], Image.Resampling.LANCZOS)
