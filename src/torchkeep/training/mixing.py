"""Mixup and cutmix, on the device: each image takes a part of another one of its batch, and so does its target.

Every draw is a function of (seed, step, number of the micro-batch), so that a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chance import ChanceKey, keyed_generator
from ..contracts import INDEX, VALID, Batch
from ..errors import SettingsError
from .binding import Binding, Inputs, batch_text
from .objective import Objective, prediction_of
from .recipe import RunSettings, TrainSettings


class Mix(NamedTuple):
    """How a batch was mixed: ``share`` of each sample is its own, the rest that of the sample which ``order`` names.

    Shapes:  order (B,) int64, on the device
    """

    share: float
    order: Tensor

    def loss(self, objective: Objective, output: Any, target: Tensor) -> Tensor:
        """The two losses by their shares. Cross-entropy without class weights, and binary cross-entropy: equal to the
        loss of the mixed targets; squared error: the same gradient.

        Source:  Zhang et al. 2018 (arXiv 1710.09412), section 2; Yun et al. 2019 (arXiv 1905.04899), equation 1
        """
        own, other = objective(output, target), objective(output, target[self.order])
        return self.share * own + (1 - self.share) * other

    def larger(self, target: Tensor) -> Tensor:
        """The targets of the larger shares: what metrics of the training batches look at."""
        return target if self.share >= 0.5 else target[self.order]


class Mixing:
    """``mixing(batch, step, part)`` → the batch with mixed images, and how they were mixed.

    ``mixup`` and ``cutmix`` are the a of their Beta(a, a), 0 for none; with both, each batch gets one of them by a
    keyed coin. ``image`` is the key of the images; ``part`` numbers the micro-batches of a step.

    Shapes:  batch[image] float (B, C, H, W), normalised
    """

    def __init__(self, image: str, seed: int, mixup: float, cutmix: float):
        self._image, self._seed, self._mixup, self._cutmix = image, seed, mixup, cutmix

    def __call__(self, batch: Batch, step: int, part: int = 0) -> tuple[Batch, Mix]:
        image = batch[self._image]
        rng = keyed_generator(ChanceKey(self._seed, step), "mixing", part)
        is_cut = rng.random() < 0.5 if self._mixup and self._cutmix else bool(self._cutmix)
        alpha = self._cutmix if is_cut else self._mixup
        share, place = float(rng.beta(alpha, alpha)), rng.random(2)
        drawn = torch.from_numpy(rng.permutation(len(image)))
        # from pinned memory the copy waits for nothing
        order = (drawn.pin_memory() if image.is_cuda else drawn).to(image.device, non_blocking=True)
        if is_cut:
            mixed, share = _cut(image, order, cut_box(image.shape[2], image.shape[3], share, *place.tolist()))
        else:
            mixed = image[order].lerp_(image, share)
        return {**batch, self._image: mixed}, Mix(share, order)


def cut_box(height: int, width: int, share: float, down: float, across: float) -> tuple[int, int, int, int]:
    """The box of 1 - ``share`` of an image about a place in it, and what of it lies inside: (top, bottom, left, right).

    Units:   down, across uniform in [0, 1)
    Source:  Yun et al. 2019 (arXiv 1905.04899), equation 2
    """
    side = math.sqrt(1 - share) / 2
    row, column, rows, columns = int(down * height), int(across * width), int(side * height), int(side * width)
    return max(row - rows, 0), min(row + rows, height), max(column - columns, 0), min(column + columns, width)


def _cut(image: Tensor, order: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """The images with the box of another one, and the share that is left of their own."""
    top, bottom, left, right = box
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = image[:, :, top:bottom, left:right][order]
    return mixed, 1 - (bottom - top) * (right - left) / (image.shape[2] * image.shape[3])


def make_mixing(
    settings: RunSettings, inputs: Inputs | None, batch: Batch, binding: Binding, objective: Objective, output: Any
) -> Mixing | None:
    """The mixing that the settings ask for; None for none. ``batch`` and ``output`` are the first, on the device.

    Raises:  SettingsError where the inputs, the targets or the loss cannot be mixed
    """
    train = settings.train
    if not train.mixup and not train.cutmix:
        return None
    names = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(names, Sequence):
        names = [name for name in batch if name not in (INDEX, VALID, *binding.targets)]
    fed = [name for name in names if isinstance(batch[name], Tensor | dict)]
    if len(fed) != 1 or not _is_images(batch[fed[0]]):
        got = batch_text({name: batch[name] for name in fed})
        raise _refusal(train, f"inputs {got or 'none'}", "one input, images (B, C, H, W)")
    target = binding.target(batch)
    if objective.name == "output.loss" or not isinstance(target, Tensor):
        got = f"loss {objective.name}, {len(binding.targets)} targets"
        raise _refusal(train, got, "one target, and a loss that is not the model's own")
    if not (target.ndim == 1 or (target.ndim == 2 and (target.is_floating_point() or target.shape[1] == 1))):
        raise _refusal(train, f"a target of {tuple(target.shape)}", "one value, or one row of numbers, for each sample")
    if not objective.adds_up(prediction_of(output), target):
        raise _refusal(train, "a loss of a whole batch at once", "a loss that is a sum or mean over samples")
    return Mixing(fed[0], settings.seed, train.mixup, train.cutmix)


def check_unmixed(train: TrainSettings) -> None:
    """Raises:  SettingsError where mixing is asked for beside a user's own step, which would not know of it"""
    if train.mixup or train.cutmix:
        raise _refusal(train, "a step of your own", "images and a loss that tk.fit calls; or mix within the step")


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _refusal(train: TrainSettings, got: str, expected: str) -> SettingsError:
    where = "train.mixup" if train.mixup else "train.cutmix"
    return SettingsError(
        "this training cannot be mixed", where=where, got=got, expected=expected,
        fix="train.mixup = 0, train.cutmix = 0",
    )  # fmt: skip
