"""Any image that a viewer shows decodes to those pixels; anything else is named."""

from __future__ import annotations

from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from torchkeep.data.decode import decode_image, resize_short_side_and_center_crop
from torchkeep.errors import BadSampleError


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 3)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    held = BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(form: str, orientation: int) -> None:
    image = Image.fromarray(smooth())
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, form, exif=exif, quality=95)
    shown = np.array(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))
    np.testing.assert_allclose(decode_image(data, "x").astype(int), shown, atol=2)


def test_exif_that_cannot_be_read_is_no_rotation() -> None:
    plain = encoded(Image.fromarray(smooth()), "JPEG")
    segment = b"\xff\xe1\x00\x0cExif\x00\x00II*\x00"
    assert decode_image(plain[:2] + segment + plain[2:], "x").shape == (40, 60, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_colour_or_grey(mode: str, form: str, channels: int) -> None:
    image = Image.fromarray(smooth())
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    try:
        data = encoded(image, form)
    except OSError:
        pytest.skip(f"{form} holds no {mode}")
    expected = np.asarray(image.convert("RGB")) if mode != "I;16" else np.asarray(image)[..., None] // 257
    decoded = decode_image(data, "x", channels)
    assert decoded.shape == (40, 60, channels)
    assert decoded.dtype == np.uint8
    assert abs(decoded.mean() - expected.mean()) < 4


def test_lossless_colours_are_exact() -> None:
    image = smooth()
    for form in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(image), form), form), image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9])
def test_a_cut_file_is_a_bad_sample(form: str, kept: float) -> None:
    data = encoded(Image.fromarray(smooth(200, 300)), form)
    with pytest.raises(BadSampleError) as caught:
        decode_image(data[: int(len(data) * kept)], "bees/0192")
    assert caught.value.where == "bees/0192"
    assert f"{int(len(data) * kept):,} bytes" in caught.value.got


def test_zeros_amid_a_jpeg_are_damage() -> None:
    data = bytearray(encoded(Image.fromarray(smooth(200, 300)), "JPEG"))
    data[3000:3100] = bytes(100)
    with pytest.raises(BadSampleError):
        decode_image(bytes(data), "x")


@pytest.mark.parametrize("data", [b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"])
def test_what_is_no_image_is_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSampleError):
        decode_image(data, "x")


def test_the_middle_square_is_taken_and_a_fitting_image_is_left_alone() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 10:50] = 200
    assert (resize_short_side_and_center_crop(image, 20) == 200).all()
    square = smooth(20, 20)
    assert np.shares_memory(resize_short_side_and_center_crop(square, 20), square)
    assert resize_short_side_and_center_crop(image[:, :, :1], 64).shape == (64, 64, 1)


def test_a_share_of_the_short_side_is_kept() -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    image[4:60, 20:76] = 200  # the middle 56 of 64
    assert (resize_short_side_and_center_crop(image, 28, fraction=0.875) == 200).all()
    assert not (resize_short_side_and_center_crop(image, 28) == 200).all()
