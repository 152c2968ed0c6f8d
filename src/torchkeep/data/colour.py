"""What the pixels of an image hold: brightness, contrast, colours, sharpness. Fractions are dropped, as Pillow does.

Images are uint8 or uint16, (H, W, 3) or (H, W, 1), contiguous; what only colours have leaves a grey image alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from .decode import Pixels
from .geometry import Draws

JITTER_DRAWS = 8
_JITTER = 0.4
_JITTER_HUE = 0.1
_BLUR_SIGMA = (0.1, 2.0)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_DROP = -0.498  # OpenCV rounds to the nearest: this much less drops the fraction, and leaves whole numbers whole

Curve = np.ndarray[Any, Any]


def color_jitter(image: Pixels, draws: Draws) -> Pixels:
    """Brightness, contrast and saturation by 0.6 to 1.4, the hue by -10 to 10 % of its circle, in random order.

    Shapes:  draws (8,) uniform in [0, 1): what by, then four whose ranks are the order
    Source:  torchvision ColorJitter
    """
    factors = 1 + (2 * draws[:4] - 1) * _JITTER
    changes: list[Callable[[Pixels], Pixels]] = [
        lambda held: adjust_brightness(held, factors[0]),
        lambda held: adjust_contrast(held, factors[1]),
        lambda held: adjust_saturation(held, factors[2]),
        lambda held: adjust_hue(held, (2 * draws[3] - 1) * _JITTER_HUE),
    ]
    for place in np.argsort(draws[4:], kind="stable"):
        image = changes[place](image)
    return image


def gaussian_blur(image: Pixels, draws: Draws) -> Pixels:
    """Blurred by a Gaussian of 0.1 to 2 pixels, cut at three of them; beyond its edge the image is mirrored.

    Shapes:  draws (1,) uniform in [0, 1)
    Source:  torchvision GaussianBlur
    """
    return blur(image, _BLUR_SIGMA[0] + draws[0] * (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]))


def blur(image: Pixels, sigma: float) -> Pixels:
    """Units:  sigma in pixels"""
    # separable by name: GaussianBlur takes twice as long on uint8, to be the same on every machine
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma)
    return _like(image, cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101))


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Towards or away from black. Source: Pillow ImageEnhance.Brightness"""
    return _through(image, _blended(image, 0, factor))


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Towards or away from the mean of its greys. Source: Pillow ImageEnhance.Contrast"""
    return _through(image, _blended(image, int(cv2.mean(_grey(image))[0] + 0.5), factor))


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Towards or away from its greys. Source: Pillow ImageEnhance.Color"""
    if image.shape[2] == 1:
        return image
    return _mixed(image, cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), factor)


def adjust_sharpness(image: Pixels, factor: float) -> Pixels:
    """Towards or away from a blurred copy; its outermost pixels stay. Source: Pillow ImageEnhance.Sharpness"""
    mixed = _mixed(image, cv2.filter2D(image, -1, _SMOOTH), factor)
    sharpened = image.copy()
    sharpened[1:-1, 1:-1] = mixed[1:-1, 1:-1]
    return sharpened


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """Units:  shift in circles. Source: torchvision adjust_hue; uint8 images have 256 hues there and here"""
    if image.shape[2] == 1:
        return image
    if image.dtype == np.uint8:
        hsv = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
        hsv[..., 0] += np.uint8(round(shift * 256) % 256)
        return _like(image, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))
    white = np.float32(_white(image))
    hsv = np.asarray(cv2.cvtColor(image / white, cv2.COLOR_RGB2HSV))
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * shift)) % np.float32(360)
    return _like(image, np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * white))


def posterize(image: Pixels, bits: int) -> Pixels:
    """Only the highest bits of each value; 8 keep an image of 16 bits whole too. Source: Pillow ImageOps.posterize"""
    if bits >= 8:
        return image
    return np.asarray(image & image.dtype.type(_white(image) - (_white(image) >> bits)))


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Values from ``threshold`` of 255 upwards are inverted. Source: Pillow ImageOps.solarize"""
    white = _white(image)
    values = np.arange(white + 1)
    return _through(image, np.where(values < threshold * white / 255, values, white - values))


def autocontrast(image: Pixels) -> Pixels:
    """Each channel stretched to the whole range. Source: Pillow ImageOps.autocontrast"""
    return _through(image, np.stack([_stretch(channel, _white(image)) for channel in cv2.split(image)], axis=1))


def equalize(image: Pixels) -> Pixels:
    """Each channel so that its values are about equally frequent. Source: Pillow ImageOps.equalize"""
    size = _white(image) + 1
    counts = [cv2.calcHist([image], [channel], None, [size], [0, size]).ravel() for channel in range(image.shape[2])]
    return _through(image, np.stack([_levelling(count.astype(np.float64), size - 1) for count in counts], axis=1))


def _stretch(channel: Pixels, white: int) -> Curve:
    low, high, _, _ = cv2.minMaxLoc(channel)
    values = np.arange(white + 1)
    if low == high:
        return values
    scale = white / (high - low)
    return np.asarray(np.clip(values * scale - low * scale, 0, white))


def _levelling(counts: Curve, white: int) -> Curve:
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) / white
    if white == 255:  # Pillow's; an image of 16 bits has fewer pixels than values, and would stay as it is
        step = step // 1
    if step == 0:
        return np.arange(white + 1)
    return np.asarray(np.clip((step // 2 + np.cumsum(counts) - counts) // step, 0, white))


def _white(image: Pixels) -> int:
    return int(np.iinfo(image.dtype).max)


def _grey(image: Pixels) -> Pixels:
    return image if image.shape[2] == 1 else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _blended(image: Pixels, base: int, factor: float) -> Curve:
    values = np.arange(_white(image) + 1, dtype=np.float32)
    return np.asarray(np.clip(base + np.float32(factor) * (values - base), 0, _white(image)))


def _mixed(image: Pixels, base: Any, factor: float) -> Pixels:
    return _like(image, cv2.addWeighted(image, factor, base.reshape(image.shape), 1 - factor, _DROP))


def _through(image: Pixels, curve: Curve) -> Pixels:
    """Each value replaced by what the curve has at its place. Shapes: curve (256 or 65536,), or with (C,) beside it"""
    table = curve.astype(image.dtype)
    if image.dtype == np.uint8:
        return _like(image, cv2.LUT(image, table if table.ndim == 1 else table[None]))
    # OpenCV before 5 has no tables of 16 bits
    return np.asarray(table[image] if table.ndim == 1 else table[image, np.arange(image.shape[2])])


def _like(image: Pixels, made: Any) -> Pixels:
    # OpenCV drops the axis of a single channel
    return np.asarray(made, image.dtype).reshape(image.shape)
