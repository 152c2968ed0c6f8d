"""Augmentations of images before they are numbers, and of their masks with them.

Every draw is a function of (seed, epoch, sample id, operation), and of nothing else. A sample's id is its
position in the dataset. The draws of a whole batch are made as arrays, one call an operation; then each image takes its
own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from ..chance import ChanceKey, keyed_generator, keyed_uniform
from ..contracts import Sample
from ..errors import DataError, SettingsError, nearest
from .colour import JITTER_DRAWS, color_jitter, gaussian_blur
from .decode import Pixels
from .geometry import (
    BOX_DRAWS,
    Canvas,
    Draws,
    horizontal_flip,
    random_affine,
    random_erasing,
    random_resized_crop,
    random_rotation,
    random_shift,
    vertical_flip,
)
from .policies import RAND_DRAWS, TRIVIAL_DRAWS, rand_augment, trivial_augment
from .samples import called

UserAugmentation = Callable[[Sample, np.random.Generator], Sample]
Augmentation = str | UserAugmentation


def _painting(change: Callable[[Pixels, Draws], Pixels]) -> Callable[[Canvas, Draws], None]:
    return lambda canvas, draws: canvas.paint(lambda image: change(image, draws))


_CROP = "random_resized_crop"
# name → (operation, number of draws)
_NAMED: dict[str, tuple[Callable[[Canvas, Draws], None], int]] = {
    _CROP: (random_resized_crop, BOX_DRAWS),
    "horizontal_flip": (horizontal_flip, 1),
    "vertical_flip": (vertical_flip, 1),
    "random_shift": (random_shift, 2),
    "random_rotation": (random_rotation, 1),
    "random_affine": (random_affine, 5),
    "color_jitter": (_painting(color_jitter), JITTER_DRAWS),
    "gaussian_blur": (_painting(gaussian_blur), 1),
    "random_erasing": (_painting(random_erasing), 1 + BOX_DRAWS),
    "rand_augment": (rand_augment, RAND_DRAWS),
    "trivial_augment": (trivial_augment, TRIVIAL_DRAWS),
}
NAMES = tuple(_NAMED)


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
        canvas = Canvas(image, size, is_mask)
        for entry, drawn in zip(self.entries, draws, strict=True):
            _NAMED[str(entry)][0](canvas, drawn[row])
        return canvas.pixels()

    def apply_all(
        self, rest: Sample, pictures: dict[str, Pixels], key: ChanceKey, sample_id: int, size: tuple[int, int]
    ) -> Sample:
        """One sample through named entries and callables. Its image, and its mask if any, are given as pixels.

        Raises:  BadSampleError where a callable fails, DataError where it returns no sample with such an image
        """
        drawn = iter(self.draw(key, np.array([sample_id])))
        canvases = {name: Canvas(held, size, name == "mask") for name, held in pictures.items()}
        for position, entry in enumerate(self.entries):
            if isinstance(entry, str):
                draws = next(drawn)[0]
                for canvas in canvases.values():
                    _NAMED[entry][0](canvas, draws)
                continue
            rng = keyed_generator(key, self._operation(position), sample_id)
            where = f"{rest.get('id', '')} (sample {sample_id}, epoch {key.epoch})".lstrip()
            sample = called(entry, _tensors(canvases) | rest, rng, where)
            for name, canvas in canvases.items():
                canvas.put(_pixels_of(sample, name, canvas.pixels().dtype, entry))
            rest = {name: value for name, value in sample.items() if name not in canvases}
        return _tensors(canvases) | rest

    def _operation(self, position: int) -> str:
        # a second flip must not undo the first; two entries of one kind draw apart, other entries change nothing
        entry = self.entries[position]
        name = entry if isinstance(entry, str) else "callable"
        earlier = [other if isinstance(other, str) else "callable" for other in self.entries[:position]]
        return f"augment/{name}/{earlier.count(name)}"


def _num_draws(entry: Augmentation) -> int:
    return _NAMED[entry][1] if isinstance(entry, str) else 0


def _tensors(canvases: dict[str, Canvas]) -> Sample:
    return {name: to_tensor(canvas.pixels()) for name, canvas in canvases.items()}


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
