"""Augmentations of images before they are numbers, and of their masks with them.

Every draw is a function of (seed, epoch, sample id, operation), and of nothing else. A sample's id is its
position in the dataset. The draws of a whole batch are made as arrays, one call an operation; then each image takes its
own row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from torch import Tensor, from_numpy

from ..chance import ChanceKey, keyed_generator, keyed_uniform
from ..contracts import Sample
from ..errors import DataError, SettingsError, nearest
from .decode import Pixels, resize

Draws = np.ndarray[Any, np.dtype[np.float64]]
UserAugmentation = Callable[[Sample, np.random.Generator], Sample]
Augmentation = str | UserAugmentation

_CROP_TRIES = 10
_CROP_SCALE = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_SHIFT_FRACTION = 1 / 8
_ROTATION_DEGREES = 15.0


def crop_box(height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
    """A box of random area and shape: (top, left, height, width); the middle of the image if ten tries do not fit.

    Shapes:  draws (22,) uniform in [0, 1): ten of (area, shape), then one of (top, left)
    Source:  torchvision RandomResizedCrop.get_params; Szegedy et al. 2015, "Going deeper with convolutions", §6
    """
    low, high = math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])
    for area_draw, shape_draw in zip(draws[0 : 2 * _CROP_TRIES : 2], draws[1 : 2 * _CROP_TRIES : 2], strict=True):
        area = height * width * (_CROP_SCALE[0] + area_draw * (_CROP_SCALE[1] - _CROP_SCALE[0]))
        ratio = math.exp(low + shape_draw * (high - low))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws[-2] * (height - box_height + 1))
            left = int(draws[-1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, round(height * _CROP_RATIO[1]))
    box_height = min(height, round(width / _CROP_RATIO[0]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(image: Pixels, draws: Draws, height: int, width: int, is_mask: bool = False) -> Pixels:
    """A random box of 8 to 100 % of the area and of ratio 3/4 to 4/3, brought to (height, width)."""
    top, left, box_height, box_width = crop_box(image.shape[0], image.shape[1], draws)
    return resize(image[top : top + box_height, left : left + box_width], height, width, is_mask)


def horizontal_flip(image: Pixels, draws: Draws, is_mask: bool) -> Pixels:
    """Left and right change places for every second sample."""
    return image[:, ::-1] if draws[0] < 0.5 else image


def vertical_flip(image: Pixels, draws: Draws, is_mask: bool) -> Pixels:
    """Top and bottom change places for every second sample."""
    return image[::-1] if draws[0] < 0.5 else image


def random_shift(image: Pixels, draws: Draws, is_mask: bool) -> Pixels:
    """Moved by up to an eighth of each side; what comes in is the image mirrored at its edge."""
    height, width = image.shape[:2]
    rows, columns = int(height * _SHIFT_FRACTION), int(width * _SHIFT_FRACTION)
    padded = np.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="reflect")
    top, left = int(draws[0] * (2 * rows + 1)), int(draws[1] * (2 * columns + 1))
    return padded[top : top + height, left : left + width]


def random_rotation(image: Pixels, draws: Draws, is_mask: bool) -> Pixels:
    """Turned about its middle by -15° to 15°; what comes in is the image mirrored at its edge."""
    height, width = image.shape[:2]
    angle = (2 * draws[0] - 1) * _ROTATION_DEGREES
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), float(angle), 1.0)
    way = cv2.INTER_NEAREST if is_mask else cv2.INTER_LINEAR
    source = np.ascontiguousarray(image)
    turned = cv2.warpAffine(source, matrix, (width, height), flags=way, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(turned, image.dtype).reshape(image.shape)


# name → (function, number of draws); random_resized_crop is called apart, since it sets the size
_NAMED: dict[str, tuple[Callable[[Pixels, Draws, bool], Pixels], int]] = {
    "horizontal_flip": (horizontal_flip, 1),
    "vertical_flip": (vertical_flip, 1),
    "random_shift": (random_shift, 2),
    "random_rotation": (random_rotation, 1),
}
_CROP = "random_resized_crop"
NAMES = (_CROP, *_NAMED)


def check_augmentations(augment: Sequence[Augmentation], where: str = "augment") -> tuple[Augmentation, ...]:
    """The same augmentations, known to be ones.

    Raises:  SettingsError for an unknown name, with the nearest known one, and for what is neither name nor callable
    """
    for entry in augment:
        if not callable(entry) and entry not in NAMES:
            raise SettingsError(
                "unknown augmentation", where=where, got=repr(entry),
                expected=f"one of {', '.join(NAMES)}, or in Python a callable (sample, rng)",
                fix=nearest(str(entry), list(NAMES)),
            )  # fmt: skip
    return tuple(augment)


@dataclass(frozen=True)
class Augmentations:
    """A checked list of augmentations, applied in order."""

    entries: tuple[Augmentation, ...] = ()

    @property
    def has_callable(self) -> bool:
        return any(callable(entry) for entry in self.entries)

    @property
    def sets_size(self) -> bool:
        """Whether the first operation takes the image at any size and leaves it at the wanted one."""
        return bool(self.entries) and self.entries[0] == _CROP

    def draw(self, key: ChanceKey, ids: np.ndarray[Any, Any]) -> list[Draws]:
        """All draws of a batch: for each entry (B, number of draws); a callable draws for itself."""
        operations = [self._operation(position) for position in range(len(self.entries))]
        counts = [_num_draws(entry) for entry in self.entries]
        return [keyed_uniform(key, name, ids, count) for name, count in zip(operations, counts, strict=True) if count]

    def apply_named(
        self, image: Pixels, draws: list[Draws], row: int, size: tuple[int, int], is_mask: bool = False
    ) -> Pixels:
        """One image, or its mask, through every named entry. There is no callable among them."""
        for entry, drawn in zip(self.entries, draws, strict=True):
            image = _apply(str(entry), image, drawn[row], size, is_mask)
        return image

    def apply_all(
        self, rest: Sample, pictures: dict[str, Pixels], key: ChanceKey, sample_id: int, size: tuple[int, int]
    ) -> Sample:
        """One sample through named entries and callables. Its image, and its mask if any, are given as pixels.

        Raises:  DataError where a callable returns something else than a sample with such an image
        """
        drawn = iter(self.draw(key, np.array([sample_id])))
        for position, entry in enumerate(self.entries):
            if isinstance(entry, str):
                draws = next(drawn)[0]
                pictures = {name: _apply(entry, held, draws, size, name == "mask") for name, held in pictures.items()}
                continue
            rng = keyed_generator(key, self._operation(position), sample_id)
            sample = entry({name: to_tensor(held) for name, held in pictures.items()} | rest, rng)
            pictures = {name: _pixels_of(sample, name, held.dtype, entry) for name, held in pictures.items()}
            rest = {name: value for name, value in sample.items() if name not in pictures}
        return {name: to_tensor(held) for name, held in pictures.items()} | rest

    def _operation(self, position: int) -> str:
        # a second flip must not undo the first; two entries of one kind draw apart, other entries change nothing
        entry = self.entries[position]
        name = entry if isinstance(entry, str) else "callable"
        earlier = [other if isinstance(other, str) else "callable" for other in self.entries[:position]]
        return f"augment/{name}/{earlier.count(name)}"


def _num_draws(entry: Augmentation) -> int:
    if not isinstance(entry, str):
        return 0
    return 2 * _CROP_TRIES + 2 if entry == _CROP else _NAMED[entry][1]


def _apply(name: str, image: Pixels, draws: Draws, size: tuple[int, int], is_mask: bool) -> Pixels:
    if name == _CROP:
        return random_resized_crop(image, draws, *size, is_mask)
    return _NAMED[name][0](image, draws, is_mask)


def to_tensor(image: Pixels) -> Tensor:
    """The same memory seen as a tensor. Shapes: (H, W, C) → (C, H, W)."""
    return from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _pixels_of(sample: Any, name: str, kind: Any, entry: UserAugmentation) -> Pixels:
    picture = sample.get(name) if isinstance(sample, dict) else None
    pixels: Any = picture.numpy() if isinstance(picture, Tensor) else picture
    if not isinstance(pixels, np.ndarray) or pixels.dtype != kind or pixels.ndim != 3:
        is_array = isinstance(pixels, np.ndarray)
        raise DataError(
            "an augmentation returns something else than a sample",
            where=getattr(entry, "__qualname__", repr(entry)),
            got=f"{name!r} of {pixels.dtype} {pixels.shape}" if is_array else type(sample).__name__,
            expected=f"a dict whose {name!r} is {kind} (C, H, W); it is normalised later, on the device",
        )
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
