"""Pictures and masks against diffusers' own `load_image` and `VaeImageProcessor`, and against PIL."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import ExifTags, Image

from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.pictures import mask, open_picture, pixels, wanted_size

SIZE = (64, 48)
IMAGES = VaeImageProcessor(vae_scale_factor=8)
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def in_mode(mode: str, height: int = 75, width: int = 61) -> Image.Image:
    """A picture with detail at several scales; alpha, if any, has all values."""
    small, fine = Image.fromarray(levels(5, 4, 4), "RGBA"), Image.fromarray(levels(height, width, 4), "RGBA")
    return Image.blend(small.resize((width, height), Image.Resampling.BICUBIC), fine, 0.3).convert(mode)


def saved(picture: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def assert_as_diffusers(given: object, *theirs: Image.Image, size: tuple[int, int] = SIZE) -> None:
    """The levels, normalised as the encoder's graph does it, are diffusers' tensor bit for bit."""
    ours = pixels("image", given, size)
    assert ours.dtype == np.uint8
    expected = IMAGES.preprocess(list(theirs), *size)
    normalised = (ours.astype(np.float32) / np.float32(255)) * np.float32(2) - np.float32(1)
    np.testing.assert_array_equal(normalised.transpose(0, 3, 1, 2), expected.numpy(), strict=True)


def their_mask(theirs: object, size: tuple[int, int] = SIZE) -> np.ndarray:
    whole = MASKS.preprocess(theirs, *size)
    return torch.nn.functional.interpolate(whole, size=(size[0] // 8, size[1] // 8)).numpy()


def assert_mask_as_diffusers(given: object, theirs: object, size: tuple[int, int] = SIZE) -> None:
    expected = their_mask(theirs, size)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(mask("mask_image", given, size), expected, strict=True)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (131, 135), (17, 200), (9, 8), (301, 63)])
def test_an_rgb_picture_of_any_size_is_diffusers_tensor(height, width):
    picture = in_mode("RGB", height, width)
    assert_as_diffusers(picture, picture)
    wanted = wanted_size("image", picture)
    assert wanted == IMAGES.get_default_height_width(picture)
    assert_as_diffusers(picture, picture, size=wanted)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_every_mode_is_what_load_image_makes_of_it(mode):
    start = in_mode("RGB") if mode in ("LAB", "PA") else in_mode("RGBA")
    picture = start.convert("P").convert("PA") if mode == "PA" else start
    picture = picture.convert("L").convert(mode) if mode in "IF" else picture
    picture = Image.frombytes("LAB", start.size, start.tobytes()) if mode == "LAB" else picture.convert(mode)
    picture = picture.resize((50, 70), Image.Resampling.BILINEAR) if mode == "F" else picture  # values between levels
    assert picture.mode == mode
    assert_as_diffusers(picture, load_image(picture))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # PIL's own advice
@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_transparency_of_a_palette_is_dropped_as_load_image_does(transparency):
    picture = saved(in_mode("RGB").convert("P"), "PNG", transparency=transparency)
    assert picture.mode == "P" and "transparency" in picture.info
    assert_as_diffusers(picture, load_image(picture))


def test_of_a_transparent_picture_the_hidden_colour_appears():
    hidden = Image.new("RGBA", (48, 64), (10, 200, 30, 0))
    assert (pixels("image", hidden, SIZE) == (10, 200, 30)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says_once(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    in_mode("RGB", 75, 130).save(tmp_path / "in", kind, exif=exif)
    theirs = load_image(str(tmp_path / "in"))
    assert theirs.size == ((75, 130) if orientation >= 5 else (130, 75))
    with Image.open(tmp_path / "in") as picture:
        for given in (picture, open_picture(tmp_path / "in")):
            assert wanted_size("image", given) == IMAGES.get_default_height_width(theirs)
            assert_as_diffusers(given, theirs)
            assert_as_diffusers(given, theirs)  # the first call has changed nothing
            assert_mask_as_diffusers(given, theirs)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_scaled_to_8(order):
    wide = np.arange(65536, dtype=f"{order}u2").reshape(256, 256)
    picture = Image.fromarray(wide)
    assert picture.mode.startswith("I;16")
    expected = (wide.astype(int) + 128) // 257  # rounded; no value is half way, as 257 is odd
    for given in (picture, Image.fromarray(wide.astype(np.int32)), saved(picture, "TIFF")):
        made = pixels("image", given, (256, 256))
        np.testing.assert_array_equal(made[0], np.stack([expected] * 3, -1))
        np.testing.assert_array_equal(mask("m", given, (256, 256))[0, 0], expected[::8, ::8] >= 128)


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
@pytest.mark.parametrize("shape", [SIZE, (75, 61)])
def test_an_array_is_the_pil_picture_of_its_levels(shape, channels):
    array = levels(*shape, *channels)
    theirs = Image.fromarray(array[..., 0] if channels == (1,) else array)
    assert_as_diffusers(array, load_image(theirs))
    assert_as_diffusers(array / 255, load_image(theirs))
    if channels:
        two = np.stack([array, array[::-1]])
        assert_as_diffusers(two, load_image(theirs), load_image(theirs.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_of_levels_are_these_levels_and_others_the_nearest(dtype):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = pixels("image", (every / 255).astype(dtype), (16, 16))
    np.testing.assert_array_equal(made[0, :, :, 0], every)
    between = np.random.default_rng(0).random((*SIZE, 3)).astype(dtype)
    theirs = IMAGES.preprocess(between[None].astype(np.float64), *SIZE).numpy()[0].transpose(1, 2, 0)
    made = pixels("image", between, SIZE)[0] / 255 * 2 - 1
    assert np.abs(made - theirs).max() <= 1 / 255 + 1e-3 * (dtype == np.float16)


def test_a_list_may_mix_kinds_and_sizes():
    first, second, third = in_mode("RGB", 131, 90), in_mode("L"), levels(2, 20, 30, 3)
    theirs = [first, load_image(second), *map(Image.fromarray, third)]
    assert_as_diffusers([first, second, third], *theirs)
    assert_as_diffusers((first, second, third), *theirs)
    assert wanted_size("image", [first, second, third]) == (128, 88)
    assert wanted_size("image", third) == (16, 24)


def test_what_is_made_shares_no_memory_with_what_was_given():
    array = levels(*SIZE, 3)
    kept, made = array.copy(), pixels("image", array, SIZE)
    made[:] = 0
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (131, 135), (17, 200)])
def test_a_pil_mask_is_diffusers_mask(mode, height, width):
    start = in_mode("RGBA", height, width)
    picture = (start.convert("L") if mode in "IF" else start).convert(mode)
    assert_mask_as_diffusers(picture, picture)


def test_masks_of_a_list_are_each_theirs():
    given = [in_mode("L", 90, 70), in_mode("RGB"), in_mode("1", 64, 48)]
    made = mask("mask_image", given, SIZE)
    np.testing.assert_array_equal(made, np.concatenate([their_mask(picture) for picture in given]), strict=True)


def test_an_array_of_the_right_size_is_diffusers_mask():
    floats = np.random.default_rng(1).random((2, *SIZE)).astype(np.float32)
    floats[0, ::8, ::8] = np.resize([0.5, np.nextafter(np.float32(0.5), np.float32(0)), 0, 1], (8, 6))
    for given in (floats, floats[0, :, :, None]):
        assert_mask_as_diffusers(given, given)
    half = floats[0].astype(np.float16)
    assert_mask_as_diffusers(half, half.astype(np.float32)[None])
    np.testing.assert_array_equal(mask("m", floats[0], SIZE), mask("m", floats[:1], SIZE), strict=True)


@pytest.mark.parametrize("shape", [SIZE, (75, 61)])
def test_an_array_of_levels_is_the_pil_mask_of_them(shape):
    grey, colour = levels(*shape), levels(*shape, 3)
    for given in (grey, grey[..., None], grey[None], grey[None, ..., None]):
        assert_mask_as_diffusers(given, Image.fromarray(grey))
    assert_mask_as_diffusers(colour, Image.fromarray(colour))


def test_bools_are_black_and_white():
    given = levels(3, 75, 61) < 100
    white = [Image.fromarray(np.where(one, 255, 0).astype(np.uint8)) for one in given]
    np.testing.assert_array_equal(mask("m", given, SIZE), np.concatenate([their_mask(one) for one in white]))
    assert mask("m", np.ones((5, 5), bool), SIZE).all()
    assert not mask("m", np.zeros((5, 5), np.uint8), SIZE).any()


def without_end(kind: str) -> Image.Image:
    file = io.BytesIO()
    in_mode("RGB").save(file, kind)
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


RGB = levels(16, 16, 3)
WRONG = {
    "an empty list": ([], "image is an empty list.*at least one picture"),
    "an item of a list": ([RGB, None], r"image\[1\] is of type NoneType: a PIL image"),
    "a path as text": ("in.png", r"image is of type str.*give PIL.Image.open\(path\)"),
    "a path": (Path("in.png"), r"image is of type PosixPath.*give PIL.Image.open\(path\)"),
    "a tensor": (torch.zeros(1, 3, 8, 8), r"image is of type Tensor.*give tensor\.detach.*transpose\(0, 2, 3, 1\)"),
    "nested lists": ([[1, 2]], r"image\[0\] is of type list"),
    "PIL without pixels": (Image.new("RGB", (0, 5)), "image is a picture of 0x5"),
    "an array without pixels": (np.zeros((0, 5, 3), np.uint8), r"image has the shape \[0, 5, 3\]: at least one"),
    "no picture in a batch": (np.zeros((0, 5, 5, 3), np.uint8), r"image has the shape \[0, 5, 5, 3\]: at least one"),
    "channels first": (np.zeros((3, 16, 16), np.uint8), r"shape \[3, 16, 16\]: \[H, W\].*np.moveaxis\(image, -3, -1\)"),
    "two channels": (np.zeros((16, 16, 2), np.uint8), r"shape \[16, 16, 2\]: \[H, W\]"),
    "a vector": (np.zeros(16, np.uint8), r"shape \[16\]: \[H, W\]"),
    "five axes": (np.zeros((1, 1, 16, 16, 3), np.uint8), r"shape \[1, 1, 16, 16, 3\]: \[H, W\]"),
    "int64": (RGB.astype(int), r"image is an array of int64: uint8.*image.astype\(np.uint8\)"),
    "bools as a picture": (RGB > 9, "image is an array of bool: uint8"),
    "NaN": (np.full((8, 8, 3), np.nan), "image holds NaN or infinite values"),
    "levels as floats": (np.full((8, 8, 3), 99.0), "image holds floats from 99 to 99: 0 to 1.*image / 255"),
    "from -1 to 1": (np.linspace(-1, 1, 192).reshape(8, 8, 3), r"floats from -1 to 1: 0 to 1.*\(image \+ 1\) / 2"),
    "a truncated JPEG": (without_end("JPEG"), "image cannot be decoded .*truncated.*whole picture"),
    "a truncated PNG": (without_end("PNG"), "image cannot be decoded .*truncated.*whole picture"),
    "mode F from 0 to 1": (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "mode F with values from 0.5 to 0.5"),
    "mode F with NaN": (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "mode F with values from nan to nan"),
    "mode I below 0": (Image.fromarray(np.full((8, 8), -1, np.int32)), "mode I with values from -1 to -1: 0 to 255"),
    "mode I beyond 16 bits": (Image.fromarray(np.full((8, 8), 65536, np.int32)), "from 65536 to 65536: 0 to 65535"),
    "a mode that PIL cannot convert": (Image.new("La", (8, 8)), "image is a picture of mode La .*RGB was expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_picture_is_refused_in_a_sentence(wrong):
    given, message = WRONG[wrong]
    with pytest.raises(InputError, match=message):
        pixels("image", given, SIZE)


def test_a_picture_smaller_than_a_latent_gives_no_size():
    picture = Image.new("RGB", (7, 30))
    with pytest.raises(InputError, match="image is 7x30: at least 8x8"):
        wanted_size("image", picture)
    assert pixels("image", picture, SIZE).shape == (1, *SIZE, 3)


def test_a_mask_of_0_and_1_as_uint8_is_refused_as_it_would_be_black():
    with pytest.raises(InputError, match=r"m is uint8 with values from 0 to 1: 0 to 255.*m.astype\(bool\)"):
        mask("m", np.eye(16, dtype=np.uint8), SIZE)
    with pytest.raises(InputError, match=r"shape \[1, 2, 16, 16\]: .*\[n, H, W\] was expected"):
        mask("m", np.zeros((1, 2, 16, 16)), SIZE)


def test_open_picture_refuses_in_a_sentence(tmp_path, monkeypatch):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=re.escape(str(path)) + message):
            open_picture(path)

    refused(tmp_path / "none.png", r" cannot be read \(No such file or directory\).*check the path")
    refused(tmp_path, r" cannot be read \(Is a directory\)")
    file = tmp_path / "in.png"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(file, r" is a Git LFS pointer.*lfs pull")
    file.write_bytes(b"no picture")
    refused(file, r" is no picture that PIL reads.*PNG")
    in_mode("RGB").save(file)
    whole = file.read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(file, r" is too large \(.*4575 pixels.*scale it down")
    monkeypatch.undo()
    file.write_bytes(whole[: len(whole) // 2])
    refused(file, r" cannot be decoded .*whole picture")


def test_open_picture_leaves_no_file_open_and_takes_the_first_frame(tmp_path):
    frames = [in_mode("RGB"), in_mode("RGB").rotate(90)]
    frames[0].save(tmp_path / "in.png", save_all=True, append_images=frames[1:])
    picture = open_picture(tmp_path / "in.png")
    (tmp_path / "in.png").write_bytes(b"")
    assert_as_diffusers(picture, frames[0])
