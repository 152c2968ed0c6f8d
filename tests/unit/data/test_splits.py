"""A split is keyed, stratified and leaves no sample out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchkeep.chance import ChanceKey
from torchkeep.data.arrays import Arrays
from torchkeep.data.dataset import Part
from torchkeep.data.foreign import as_dataset
from torchkeep.data.splits import split, split_indices
from torchkeep.errors import DataError


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("size", [20, 101, 1000])
def test_the_parts_are_the_whole_and_each_class_is_divided_alike(fraction: float, size: int) -> None:
    labels = np.random.default_rng(0).choice(4, size, p=[0.6, 0.3, 0.08, 0.02])
    train, valid = split_indices(size, labels, fraction, 0)
    assert sorted([*train, *valid]) == list(range(size))
    assert abs(len(valid) - fraction * size) <= 4
    for label in np.unique(labels):
        count = (labels == label).sum()
        assert abs((labels[valid] == label).sum() - fraction * count) <= 1.001
        assert (labels[train] == label).any()


def test_a_seed_is_a_split() -> None:
    one, same, other = (split_indices(100, None, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_a_part_is_the_whole_at_other_places() -> None:
    whole = Arrays(x=torch.arange(10.0), y=torch.arange(10) % 2)
    part = Part(whole, np.array([7, 2, 5]))
    key = ChanceKey()
    assert len(part) == 3
    assert part[0] == whole[7]
    assert part.read(1, key) == whole.read(2, key)
    batch = part.read_batch(np.array([2, 0]), key)
    assert batch is not None
    assert batch["x"].tolist() == [5, 7]
    assert part.id_of(0) == "7"
    assert part.schema is whole.schema
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0, 1]
    assert part.fingerprint() != Part(whole, np.array([7, 2, 6])).fingerprint()


def test_foreign_data_are_divided_too() -> None:
    train, valid = split(as_dataset([(torch.zeros(2), number) for number in range(10)]), 0.3, 0)
    assert (len(train), len(valid)) == (7, 3)


def test_an_empty_part_is_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        split_indices(5, None, 0.1, 0)
