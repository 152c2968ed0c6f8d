"""Where the pixels of an image and of its mask lie: boxes, flips and warps.

Flips wait for the warp beside them, so that the pixels are read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from .decode import IGNORED_PIXEL, Pixels, resize

Draws = np.ndarray[Any, np.dtype[np.float64]]
Matrix = np.ndarray[Any, np.dtype[np.float64]]
Box = tuple[int, int, int, int]

_BOX_TRIES = 10
BOX_DRAWS = 2 * _BOX_TRIES + 2
_CROP_SCALE = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_ERASED_SCALE = (0.02, 0.33)
_ERASED_RATIO = (1 / 3.3, 1 / 0.3)  # width / height; torchvision's 0.3 to 3.3 is height / width
_ERASED_SHARE = 0.5
_SHIFT_FRACTION = 1 / 8
_ROTATION_DEGREES = 15.0
_AFFINE_DEGREES = 15.0
_AFFINE_SHIFT_FRACTION = 0.1
_AFFINE_SCALE = (0.9, 1.1)
_AFFINE_SHEAR_DEGREES = 10.0


class Canvas:
    """An image, or its mask, on its way through the operations; ``size`` is what a crop brings it to.

    A flip before or after a warp becomes part of its matrix: a flip moves pixel onto pixel, and what lies beyond the
    edge is the same from both sides, so one reading gives what two would. Two warps stay two: what the first moves out
    of the image, or reads between pixels, the second must find so.
    """

    def __init__(self, image: Pixels, size: tuple[int, int], is_mask: bool = False):
        self._image, self.size, self.is_mask = image, size, is_mask
        self._matrix: Matrix | None = None
        self._edge: int | None = None  # of the warp that waits

    @property
    def height(self) -> int:
        return int(self._image.shape[0])

    @property
    def width(self) -> int:
        return int(self._image.shape[1])

    def flip(self, rows: bool = False, columns: bool = False) -> None:
        matrix = np.eye(3)
        if columns:
            matrix[0] = -1, 0, self.width - 1
        if rows:
            matrix[1] = 0, -1, self.height - 1
        self._matrix = matrix if self._matrix is None else matrix @ self._matrix

    def warp(self, matrix: Matrix, is_mirrored: bool) -> None:
        """Moved by a matrix of pixel coordinates; what comes in is the image mirrored at its edge, or nothing.

        Nothing is black in an image, and no class in a mask.
        Shapes:  matrix (3, 3), of (x, y, 1)
        """
        if self._edge is not None:
            self.pixels()
        self._matrix = matrix if self._matrix is None else matrix @ self._matrix
        self._edge = cv2.BORDER_REFLECT_101 if is_mirrored else cv2.BORDER_CONSTANT

    def pixels(self) -> Pixels:
        """What waits is done. Shapes: (H, W, C), C contiguous where anything was done."""
        if self._matrix is not None:
            image, matrix = np.ascontiguousarray(self._image), self._matrix
            done = _flipped(image, matrix) if self._edge is None else self._warped(image, matrix, self._edge)
            self._image = np.asarray(done, image.dtype).reshape(image.shape)
            self._matrix = self._edge = None
        return self._image

    def _warped(self, image: Pixels, matrix: Matrix, edge: int) -> Any:
        way = cv2.INTER_NEAREST if self.is_mask else cv2.INTER_LINEAR
        fill = (IGNORED_PIXEL,) if self.is_mask else (0, 0, 0)
        return cv2.warpAffine(
            image, matrix[:2], (self.width, self.height), flags=way, borderMode=edge, borderValue=fill
        )  # fmt: skip

    def put(self, image: Pixels) -> None:
        """The pixels are replaced, once nothing waits."""
        self._image = image

    def paint(self, change: Callable[[Pixels], Pixels]) -> None:
        """Another image of the same size; a mask stays as it is."""
        if not self.is_mask:
            self._image = change(np.ascontiguousarray(self.pixels()))


def _flipped(image: Pixels, matrix: Matrix) -> Any:
    rows, columns = matrix[1, 1] < 0, matrix[0, 0] < 0
    # a view that runs backwards is cheap to make, but takes NumPy 30 times as long to copy
    return cv2.flip(image, -1 if rows and columns else int(columns)) if rows or columns else image


def random_box(
    height: int, width: int, draws: Draws, scale: tuple[float, float], ratio: tuple[float, float], most: tuple[int, int]
) -> Box | None:
    """A box of random area and shape, no higher and wider than ``most``; None where ten tries do not fit.

    Shapes:  draws (22,) uniform in [0, 1): ten of (area, shape), then one of (top, left) → (top, left, height, width)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, shape_draw in zip(draws[0 : 2 * _BOX_TRIES : 2], draws[1 : 2 * _BOX_TRIES : 2], strict=True):
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        drawn = math.exp(low + shape_draw * (high - low))
        box_width, box_height = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < box_width <= most[1] and 0 < box_height <= most[0]:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    return None


def crop_box(height: int, width: int, draws: Draws) -> Box:
    """A box of random area and shape: (top, left, height, width); the middle of the image if ten tries do not fit.

    Shapes:  draws (22,) uniform in [0, 1)
    Source:  torchvision RandomResizedCrop.get_params; Szegedy et al. 2015, "Going deeper with convolutions", §6
    """
    box = random_box(height, width, draws, _CROP_SCALE, _CROP_RATIO, (height, width))
    if box is not None:
        return box
    box_width = min(width, round(height * _CROP_RATIO[1]))
    box_height = min(height, round(width / _CROP_RATIO[0]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(canvas: Canvas, draws: Draws) -> None:
    """A random box of 8 to 100 % of the area and of ratio 3/4 to 4/3, brought to the canvas's size."""
    top, left, height, width = crop_box(canvas.height, canvas.width, draws)
    canvas.put(resize(canvas.pixels()[top : top + height, left : left + width], *canvas.size, canvas.is_mask))


FLIPPED_BELOW = 0.5


def horizontal_flip(canvas: Canvas, draws: Draws) -> None:
    """Left and right change places for every second sample."""
    if draws[0] < FLIPPED_BELOW:
        canvas.flip(columns=True)


def vertical_flip(canvas: Canvas, draws: Draws) -> None:
    """Top and bottom change places for every second sample."""
    if draws[0] < FLIPPED_BELOW:
        canvas.flip(rows=True)


def random_shift(canvas: Canvas, draws: Draws) -> None:
    """Moved by up to an eighth of each side; what comes in is the image mirrored at its edge."""
    image, height, width = canvas.pixels(), canvas.height, canvas.width
    rows, columns = int(height * _SHIFT_FRACTION), int(width * _SHIFT_FRACTION)
    padded = cv2.copyMakeBorder(np.ascontiguousarray(image), rows, rows, columns, columns, cv2.BORDER_REFLECT_101)
    top, left = int(draws[0] * (2 * rows + 1)), int(draws[1] * (2 * columns + 1))
    canvas.put(np.asarray(padded, image.dtype)[top : top + height, left : left + width].reshape(image.shape))


def random_rotation(canvas: Canvas, draws: Draws) -> None:
    """Turned about its middle by -15° to 15°; what comes in is the image mirrored at its edge."""
    angle = (2 * draws[0] - 1) * _ROTATION_DEGREES
    middle = ((canvas.width - 1) / 2, (canvas.height - 1) / 2)
    canvas.warp(np.vstack([cv2.getRotationMatrix2D(middle, float(angle), 1.0), (0, 0, 1)]), is_mirrored=True)


def random_affine(canvas: Canvas, draws: Draws) -> None:
    """Turned, moved, scaled and sheared; what comes in is the image mirrored at its edge.

    By -15° to 15°, -10 to 10 % of each side, 0.9 to 1.1, and -10° to 10° along x.
    Shapes:  draws (5,) uniform in [0, 1): angle, two of shift, scale, shear
    Source:  torchvision RandomAffine.get_params
    """
    turn, *shifts, shear = (2 * draws[[0, 1, 2, 4]] - 1).tolist()
    shift = [round(drawn * _AFFINE_SHIFT_FRACTION * side) for drawn, side in zip(shifts, _xy(canvas), strict=True)]
    scale = _AFFINE_SCALE[0] + draws[3] * (_AFFINE_SCALE[1] - _AFFINE_SCALE[0])
    shears = (math.radians(shear * _AFFINE_SHEAR_DEGREES), 0.0)
    moved = affine_matrix(math.radians(turn * _AFFINE_DEGREES), (shift[0], shift[1]), scale, shears)
    canvas.warp(about((canvas.width - 1) / 2, (canvas.height - 1) / 2, moved), is_mirrored=True)


def _xy(canvas: Canvas) -> tuple[int, int]:
    return canvas.width, canvas.height


def affine_matrix(angle: float, shift: tuple[float, float], scale: float, shear: tuple[float, float]) -> Matrix:
    """Shear, then scale, then a turn clockwise, then a shift, about (0, 0) with y downwards.

    Shapes:  (3, 3)
    Units:   angles in radians, shifts in pixels
    Source:  torchvision.transforms.functional._get_inverse_affine_matrix, its RSS
    """
    along, across = shear
    column = math.cos(angle - across) / math.cos(across), math.sin(angle - across) / math.cos(across)
    tangent = math.tan(along)
    second = -column[0] * tangent - math.sin(angle), -column[1] * tangent + math.cos(angle)
    return np.array(
        [[scale * column[0], scale * second[0], shift[0]], [scale * column[1], scale * second[1], shift[1]], [0, 0, 1]]
    )


def about(x: float, y: float, matrix: Matrix) -> Matrix:
    """The same, with (x, y) in place of (0, 0)."""
    moved = matrix.copy()
    moved[:2, 2] += (x, y) - matrix[:2, :2] @ (x, y)
    return moved


def random_erasing(image: Pixels, draws: Draws) -> Pixels:
    """A black box over 2 to 33 % of every second image, height to width 0.3 to 3.3; none where ten tries do not fit.

    Shapes:  draws (23,) uniform in [0, 1): whether, then those of a box
    Source:  torchvision RandomErasing; Zhong et al. 2017 (arXiv 1708.04896), "Random erasing data augmentation"
    """
    height, width = image.shape[:2]
    if draws[0] >= _ERASED_SHARE:
        return image
    box = random_box(height, width, draws[1:], _ERASED_SCALE, _ERASED_RATIO, (height - 1, width - 1))
    if box is None:
        return image
    top, left, box_height, box_width = box
    erased = image.copy()
    erased[top : top + box_height, left : left + box_width] = 0
    return erased
