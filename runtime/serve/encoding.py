"""Pictures as files: what is sent, and what a client uploads. These take milliseconds: call them off the event loop."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from turbochain.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("png", "jpeg", "webp")
QUALITY = 90
_MOST_PIXELS = 4096 * 4096
_PNG_LEVEL = 1  # zlib's: the fastest, about a tenth larger than the smallest


@dataclass(frozen=True)
class Encoding:
    """How a picture becomes a file."""

    format: str = "png"  # one of FORMATS
    quality: int = QUALITY  # 0 to 100, of JPEG and WebP

    def __post_init__(self) -> None:
        """Raise InputError for a format that is not written."""
        if self.format not in FORMATS:
            raise InputError(f"output_format={self.format!r}: choose from {', '.join(FORMATS)}")
        if not 0 <= self.quality <= 100:
            raise InputError(f"quality {self.quality}: a number from 0 to 100 was expected")

    def encode(self, picture: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
        """Return a picture [H, W, 3] uint8 as a file; `text` becomes text chunks in a PNG, and is left out of
        others."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        file = io.BytesIO()
        image = Image.fromarray(picture)
        if self.format == "png":
            info = PngInfo()
            for name, value in (text or {}).items():
                info.add_text(name, value)  # Latin-1 if it suffices: that is what most programs read
            image.save(file, "PNG", compress_level=_PNG_LEVEL, pnginfo=info)
        elif self.format == "jpeg":
            image.save(file, "JPEG", quality=self.quality)
        else:
            image.save(file, "WEBP", quality=self.quality, method=0)
        return file.getvalue()


def decode(argument: str, file: bytes) -> "Image.Image":
    """Return the picture in a PNG, JPEG or WebP file, with its transparency; InputError if it is none, or too large.

    `argument` names it in the messages.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            opened = Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP"))
        if opened.width * opened.height > _MOST_PIXELS:
            raise InputError(
                f"{argument} is {opened.width}x{opened.height}: at most {_MOST_PIXELS} pixels were expected"
            )
        opened.load()
    except InputError:
        raise
    except Exception as error:  # PIL's plugins raise whatever the bytes lead to
        raise InputError(f"{argument} cannot be read as a PNG, JPEG or WebP file; save it again") from error
    return opened


def decode_base64(argument: str, text: str) -> "Image.Image":
    """Return the picture of a base64 text, which may be a data URL. Raises what `decode` raises."""
    found = re.match(r"data:image/[\w.+-]+;base64,", text[:64])
    try:
        file = base64.b64decode(text[found.end() :] if found else text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{argument} is no base64 text of a picture's file") from None
    return decode(argument, file)


def repainted(argument: str, mask: "Image.Image") -> "Image.Image":
    """Return OpenAI's mask as diffusers': its transparent places are repainted, and become white."""
    from PIL import ImageOps

    if "A" not in mask.getbands() and "transparency" not in mask.info:
        raise InputError(
            f"{argument} has no transparency: a picture whose transparent places are to be repainted was expected"
        )
    return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
