"""Datasets and augmentations that go wrong, for a loader's processes to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import torchkeep as tk


class Numbers(Dataset[Any]):
    """Rows of ``width`` float64 that end in their own number."""

    def __init__(self, size: int, width: int = 3):
        self.size, self.width = size, width

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = torch.zeros(self.width, dtype=torch.float64)
        row[-1] = index
        return row, index % 3


class Slow(Numbers):
    """Takes ``seconds`` over some samples, or over all."""

    def __init__(self, size: int, seconds: float, slow: tuple[int, ...] | None = None, width: int = 3):
        super().__init__(size, width)
        self.seconds, self.slow = seconds, slow

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.slow is None or index in self.slow:
            time.sleep(self.seconds)
        return super().__getitem__(index)


class Deadly(Numbers):
    """Some samples end the process that reads them, as a decoder's own fault does; not in the one that made it."""

    def __init__(self, size: int, deadly: tuple[int, ...]):
        super().__init__(size)
        self.deadly, self.home = deadly, os.getpid()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Failing(Numbers):
    """Some samples cannot be given."""

    def __init__(self, size: int, failing: tuple[int, ...]):
        super().__init__(size)
        self.failing = failing

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.failing:
            raise ValueError(f"nothing at {index}")
        return super().__getitem__(index)


class DeadlyFolder(tk.ImageFolder):
    """As ``Deadly``, of images."""

    def __init__(self, root: Path, deadly: tuple[int, ...]):
        super().__init__(root, image_size=16)
        self.deadly, self.home = deadly, os.getpid()

    def decoded(self, index: int, where: str = "") -> Any:
        if index in self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decoded(index, where)


class SlowFolder(tk.ImageFolder):
    """Waits for one of its images."""

    def __init__(self, root: Path):
        super().__init__(root, image_size=16)

    def decoded(self, index: int, where: str = "") -> Any:
        if index == 5:
            time.sleep(1.0)
        return super().decoded(index, where)


def broken_augmentation(sample: dict[str, Any], rng: Any) -> dict[str, Any]:
    """Divides by nothing."""
    return {**sample, "share": 1 // (len(sample) - len(sample))}
