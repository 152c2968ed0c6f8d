"""Encoded bytes → uint8 pixels, rows first, colours last; and the geometry that has no chance in it."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import BadSampleError

U8 = np.ndarray[Any, np.dtype[np.uint8]]
Pixels = np.ndarray[Any, Any]
"""uint8, or uint16 where 16 bits are kept."""

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte of RGB
IGNORED_PIXEL = 255  # in a mask: the value of "no class", as PASCAL VOC has it

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF_SEARCH_BYTES = 1 << 16
_ORIENTATION_TAG = 0x0112
_START_OF_SCAN = 0xDA
_TIFF_BITS_TAG = 0x0102
_SMALL_GREYS = {2: 85, 4: 17}  # bits of a PNG's pixel → by what Pillow multiplies it, so that white is 255

# the loader's threads share the cores already; and a damaged image is reported here, not on the terminal
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_image(data: bytes, name: str, channels: int = 3, bits: int = 8) -> Pixels:
    """Pixels as a viewer shows them: orientation applied, transparency dropped, 16 bits scaled to 8 or 8 to 16.

    Shapes:  (H, W, 3) RGB, or (H, W, 1) grey where ``channels`` is 1; uint8, or uint16 where ``bits`` is 16
    Raises:  BadSampleError where the bytes are no whole image, or one of more than MAX_PIXELS; ``name`` says which
    """
    try:
        _check_size(data)
        if data[:3] == _JPEG:
            return in_bits(_decode_jpeg(data, channels), bits)
        return _decode_other(data, channels, bits)
    # a decoder may fail in any way on damaged bytes (SyntaxError, struct.error, cv2.error …)
    except Exception as error:
        raise BadSampleError(
            "this image cannot be decoded", where=name, got=_describe(data, error),
            expected="a complete JPEG, PNG, WebP, BMP, GIF or TIFF",
            fix="torchkeep survey DATA --bad lists all such images; mend or remove them and start a new run",
        ) from None  # fmt: skip


def decode_mask(data: bytes, name: str) -> U8:
    """The class number of each pixel: palettes and greys as they are stored, 255 for no class.

    Shapes:  (H, W, 1) uint8
    Raises:  BadSampleError where the bytes are no whole image of one number for each pixel
    """
    try:
        _check_size(data)
        with Image.open(BytesIO(data)) as opened:
            if opened.mode not in ("1", "L", "P"):
                raise ValueError(f"an image of mode {opened.mode}")
            classes = np.array(opened).astype(np.uint8)
        is_small_grey = data[:8] == _PNG and data[25] == 0 and data[24] in _SMALL_GREYS
        return (classes // _SMALL_GREYS[data[24]] if is_small_grey else classes)[..., None]
    except Exception as error:
        raise BadSampleError(
            "this mask cannot be decoded", where=name, got=_describe(data, error),
            expected="a PNG of one class number from 0 to 255 for each pixel (grey or palette)",
        ) from None  # fmt: skip


def _check_size(data: bytes) -> None:
    """What the header says, before anything is allocated."""
    if data[:3] == _JPEG:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
    elif data[:8] == _PNG and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
    else:
        with Image.open(BytesIO(data)) as opened:  # it may warn of the size that is refused below
            width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:,} × {height:,} pixels, where the limit is {MAX_PIXELS:,} pixels")


def _describe(data: bytes, error: Exception) -> str:
    size = f"{len(data):,} bytes"
    if not data:
        return size
    if data[:3] == _JPEG and b"\xff\xd9" not in data[-64:]:
        return f"{size} without an end marker"
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text names an address in memory
        return f"{size} of no known form"
    return f"{size}, {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


def _decode_jpeg(data: bytes, channels: int) -> U8:
    try:
        image: U8 = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError as error:
        if _is_damage(str(error)):
            raise
        return _decode_by_pillow(data, channels)  # rare forms of JPEG, and harmless bytes between segments
    return np.asarray(_oriented(image, _exif_orientation(data, b"Exif\x00\x00", _end_of_header(data))))


def _is_damage(said: str) -> bool:
    return "remature end" in said or ("Corrupt JPEG" in said and "extraneous" not in said)


def _decode_other(data: bytes, channels: int, bits: int) -> Pixels:
    is_png = data[:8] == _PNG
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if is_png or (is_webp and b"EXIF" not in data):
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if stored is not None:
            pixels = _in_channels(in_bits(np.asarray(stored), bits), channels)
            return _oriented(pixels, _exif_orientation(data, b"eXIf") if is_png else 1)
    return _decode_by_pillow(data, channels, bits)


def _decode_by_pillow(data: bytes, channels: int, bits: int = 8) -> Pixels:
    with Image.open(BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("pixels in floating point, whose range is not stated")
        if image.mode.startswith("I"):
            return _in_channels(in_bits(_as_uint16(np.array(image)), bits), channels)
        if bits == 16 and 16 in getattr(opened, "tag_v2", {}).get(_TIFF_BITS_TAG, ()):
            # Pillow keeps 8 bits of each channel; OpenCV keeps all, and turns a TIFF as its tag says
            stored = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
            return _in_channels(in_bits(stored, bits), channels)
        if "transparency" in image.info:
            image = image.convert("RGBA")
        pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return in_bits(pixels.reshape(*pixels.shape[:2], channels), bits)


def _as_uint16(stored: Pixels) -> Pixels:
    lowest, highest = int(stored.min()), int(stored.max())
    if lowest < 0 or highest > 0xFFFF:
        raise ValueError(f"pixels from {lowest:,} to {highest:,}, where 16 bits hold 0 to 65,535")
    return stored.astype(np.uint16)


def in_bits(stored: Pixels, bits: int) -> Pixels:
    """Pixels of 8 or 16 bits as such of ``bits``: white stays white."""
    if stored.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels of type {stored.dtype}")
    if stored.dtype.itemsize * 8 == bits:
        return stored
    if bits == 16:
        return stored.astype(np.uint16) * 257
    # 257 = 65535 / 255; half of it rounds to the nearest
    return ((stored.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _in_channels(stored: Pixels, channels: int) -> Pixels:
    """OpenCV's grey, BGR or BGRA as RGB or grey."""
    depth = 1 if stored.ndim == 2 else stored.shape[2]
    if depth not in (1, 3, 4):
        raise ValueError(f"{depth} channels")
    if depth == channels:
        converted = stored if channels == 1 else cv2.cvtColor(stored, cv2.COLOR_BGR2RGB)
    elif channels == 1:
        converted = cv2.cvtColor(stored, cv2.COLOR_BGR2GRAY if depth == 3 else cv2.COLOR_BGRA2GRAY)
    else:
        converted = cv2.cvtColor(stored, cv2.COLOR_GRAY2RGB if depth == 1 else cv2.COLOR_BGRA2RGB)
    pixels: Pixels = np.asarray(converted)
    return pixels.reshape(*pixels.shape[:2], channels)


def _end_of_header(data: bytes) -> int:
    """Where the pixels of a JPEG begin: to look through them for what stands before them takes longer than a flip."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != _START_OF_SCAN and place < len(data) - 4:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return min(place, len(data)) if data[place : place + 1] == b"\xff" else len(data)


def _exif_orientation(data: bytes, mark: bytes, end: int = _EXIF_SEARCH_BYTES) -> int:
    """1 to 8 as in EXIF 2.32, table 6; 1 where nothing is said or what is said cannot be read."""
    start = data.find(mark, 0, min(end, _EXIF_SEARCH_BYTES))
    if start < 0:
        return 1
    tiff = data[start + len(mark) :][:_EXIF_SEARCH_BYTES]
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for entry_idx in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * entry_idx)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _oriented(image: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    # after the transpose of 5 to 8: what is left is none, left-right, both, up-down
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def resize(image: Pixels, height: int, width: int, is_mask: bool = False) -> Pixels:
    """The image at another size; the same array where it has that size. A mask takes its nearest pixels.

    Averaging over areas costs 3.7 times as much as bilinear reading, so it is kept for where aliasing would show:
    from half the size down.

    Shapes:  (H, W, C) → (height, width, C)
    """
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= 2 * height and image.shape[1] >= 2 * width
    way = cv2.INTER_NEAREST_EXACT if is_mask else cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=way)
    return np.asarray(resized, image.dtype).reshape(height, width, image.shape[2])


def resize_short_side_and_center_crop(image: Pixels, size: int, is_mask: bool = False, fraction: float = 1.0) -> Pixels:
    """The middle square, of so much of the short side, at ``size``; the same array where it already has that size.

    Shapes:  (H, W, C) → (size, size, C)
    """
    height, width = image.shape[:2]
    side = max(1, round(fraction * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    # cropping first gives the same picture for less work
    return resize(image[top : top + side, left : left + side], size, size, is_mask)
