"""RandAugment and TrivialAugment: operations chosen by chance from one list of fourteen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    equalize,
    posterize,
    solarize,
)
from .decode import Pixels
from .geometry import Canvas, Draws, Matrix, about, affine_matrix

Choice = tuple[str, float]
"""An operation and its magnitude: a tangent, pixels, degrees, a factor less 1, bits, or a threshold of 255."""

RAND_DRAWS = 4
TRIVIAL_DRAWS = 3
_NUM_BINS = 31
_RAND_BIN = 9

# operation → its most for (RandAugment, TrivialAugment): sides for RandAugment's shifts, pixels for TrivialAugment's
_MOST = {
    "identity": (0.0, 0.0),
    "shear_x": (0.3, 0.99),
    "shear_y": (0.3, 0.99),
    "translate_x": (150 / 331, 32.0),
    "translate_y": (150 / 331, 32.0),
    "rotate": (30.0, 135.0),
    "brightness": (0.9, 0.99),
    "color": (0.9, 0.99),
    "contrast": (0.9, 0.99),
    "sharpness": (0.9, 0.99),
    "posterize": (4.0, 6.0),
    "solarize": (255.0, 255.0),
    "autocontrast": (0.0, 0.0),
    "equalize": (0.0, 0.0),
}
_NAMES = tuple(_MOST)

_PAINTS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "brightness": lambda image, magnitude: adjust_brightness(image, 1 + magnitude),
    "color": lambda image, magnitude: adjust_saturation(image, 1 + magnitude),
    "contrast": lambda image, magnitude: adjust_contrast(image, 1 + magnitude),
    "sharpness": lambda image, magnitude: adjust_sharpness(image, 1 + magnitude),
    "posterize": lambda image, magnitude: posterize(image, int(magnitude)),
    "solarize": solarize,
    "autocontrast": lambda image, _: autocontrast(image),
    "equalize": lambda image, _: equalize(image),
}


def rand_augment(canvas: Canvas, draws: Draws) -> None:
    """Two operations of fourteen, at magnitude 9 of 30.

    Source:  torchvision RandAugment; Cubuk et al. 2019 (arXiv 1909.13719), "RandAugment"
    """
    for choice in rand_choices(draws, canvas.height, canvas.width):
        act(canvas, *choice)


def trivial_augment(canvas: Canvas, draws: Draws) -> None:
    """One operation of fourteen, at one of 31 magnitudes.

    Source:  torchvision TrivialAugmentWide; Müller & Hutter 2021 (arXiv 2103.10158), "TrivialAugment"
    """
    act(canvas, *trivial_choice(draws))


def rand_choices(draws: Draws, height: int, width: int) -> list[Choice]:
    """Shapes:  draws (4,) uniform in [0, 1): two of (operation, sign)"""
    choices = []
    for operation, sign in draws.reshape(2, 2).tolist():
        name = _NAMES[int(operation * len(_NAMES))]
        most = _MOST[name][0] * {"translate_x": width, "translate_y": height}.get(name, 1)
        choices.append((name, _magnitude(name, most, _RAND_BIN, sign < 0.5)))
    return choices


def trivial_choice(draws: Draws) -> Choice:
    """Shapes:  draws (3,) uniform in [0, 1): operation, magnitude, sign"""
    name = _NAMES[int(draws[0] * len(_NAMES))]
    return name, _magnitude(name, _MOST[name][1], int(draws[1] * _NUM_BINS), bool(draws[2] < 0.5))


def _magnitude(name: str, most: float, place: int, is_negative: bool) -> float:
    magnitude = most * place / (_NUM_BINS - 1)
    if name == "posterize":
        return 8.0 - round(magnitude)
    if name == "solarize":
        return most - magnitude
    return -magnitude if is_negative else magnitude


def act(canvas: Canvas, name: str, magnitude: float) -> None:
    """One operation. Geometry reads between pixels and brings in black; in a mask it brings in no class."""
    if name in _PAINTS:
        canvas.paint(lambda image: _PAINTS[name](image, magnitude))
    elif name != "identity":
        canvas.warp(_matrix(canvas, name, magnitude), is_mirrored=False)


def _matrix(canvas: Canvas, name: str, magnitude: float) -> Matrix:
    if name == "rotate":  # anticlockwise, about the middle
        turn = affine_matrix(-math.radians(magnitude), (0, 0), 1, (0, 0))
        return about((canvas.width - 1) / 2, (canvas.height - 1) / 2, turn)
    matrix = np.eye(3)
    if name.startswith("translate"):
        matrix[int(name == "translate_y"), 2] = int(magnitude)
        return matrix
    matrix[(0, 1) if name == "shear_x" else (1, 0)] = -magnitude
    return about(-0.5, -0.5, matrix)  # about the corner of the first pixel
