"""Datasets that a loader's processes can import: none of them knows of Torchkeep."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SIZE = 23


class Noisy(Dataset[Any]):
    """Adds noise from the named global generators."""

    def __init__(self, sources: tuple[str, ...] = ("torch", "numpy", "python"), size: int = SIZE):
        self.sources, self.size = sources, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, *self.draws()], dtype=torch.float64), index % 3

    def draws(self) -> list[float]:
        found = []
        if "torch" in self.sources:
            found.append(float(torch.rand(())))
        if "numpy" in self.sources:
            found.append(float(np.random.rand()))
        if "python" in self.sources:
            found.append(random.random())
        return found


class SeldomNoisy(Noisy):
    """Draws for samples 6 and 13 alone, at which no probe looks."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = self.draws() if index in (6, 13) else [0.0] * len(self.sources)
        return torch.tensor([index, *noise], dtype=torch.float64), index % 3


class OwnGenerator(Dataset[Any]):
    """Draws from a generator of its own, which nobody can rewind."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, self.generator.random()], dtype=torch.float32), index % 3


def drop_some(samples: list[tuple[Tensor, int]]) -> dict[str, Any]:
    """A collate that draws: a mask for each batch, and texts and arrays beside it."""
    inputs = torch.stack([sample[0] for sample in samples])
    mask = torch.rand(inputs.shape) < 0.5
    return {
        "input": inputs.masked_fill(mask, 0.0),
        "target": np.array([sample[1] for sample in samples]),
        "name": [f"sample {int(sample[0][0])}" for sample in samples],
        "each": [sample[0] * random.random() for sample in samples],
    }


def stack_inputs(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collate for samples that are dicts, which draws too."""
    keys = [key for key in samples[0] if key != "id"]
    made = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in keys}
    return {**made, "noise": torch.rand(len(samples))}


def same(one: Any, other: Any) -> bool:
    """Whether two batches are equal to the bit: keys, types, shapes, layouts in memory, values."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        return alike and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def generators() -> tuple[Any, bytes, bytes]:
    """The states of the three global generators, to be compared."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), repr((name, keys.tolist(), rest)).encode(), bytes(torch.get_rng_state().numpy())
