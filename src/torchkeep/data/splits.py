"""A dataset in two parts, by keyed chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from torch.utils.data import Dataset

from ..chance import ChanceKey, keyed_uniform
from ..contracts import Batch, KeyedDataset, Schema
from ..errors import DataError
from .tables import Table

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Part(Dataset[Any]):
    """Some samples of a dataset, under its interface. A sample's chance stays that of its place in the whole.

    Shapes:  indices (n,) int64, positions in ``dataset``
    """

    def __init__(self, dataset: KeyedDataset, indices: Indices):
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.schema: Schema = dataset.schema
        self.threads = bool(getattr(dataset, "threads", False))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def read(self, index: int, key: ChanceKey) -> Any:
        return self.dataset.read(int(self.indices[index]), key)

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch | None:
        return self.dataset.read_batch(self.indices[indices], key)

    def fingerprint(self) -> str:
        """xxh3 of the whole's fingerprint and of the positions."""
        return str(xxhash.xxh3_128_hexdigest(self.dataset.fingerprint().encode() + self.indices.tobytes()))

    def without_augmentation(self) -> Part:
        plain = getattr(self.dataset, "without_augmentation", None)
        return Part(plain(), self.indices) if plain is not None else self

    def id_of(self, index: int) -> str:
        name = getattr(self.dataset, "id_of", str)
        return str(name(int(self.indices[index])))

    @property
    def labels(self) -> Indices | None:
        """Class of each sample, (n,) int64; None where the whole has none."""
        labels = getattr(self.dataset, "labels", None)
        return None if labels is None else labels[self.indices]


def split(dataset: KeyedDataset, fraction: float, seed: int) -> tuple[KeyedDataset, KeyedDataset]:
    """(train, valid): ``fraction`` of the samples for validation, in each class alike, without augmentation.

    The rule: the samples are put in the order of (class, draw keyed by seed and position); the sample at place k is for
    validation where floor((k + 1) · fraction) > floor(k · fraction). A class that would lose its last training sample
    keeps it. Without labels all samples count as one class. A table's statistics become those of its training rows.

    Raises:  DataError if either part would be empty
    """
    train, valid = split_indices(len(dataset), getattr(dataset, "labels", None), fraction, seed)
    if isinstance(dataset, Table):
        return dataset.divided(train, valid)
    return Part(dataset, train), Part(dataset, valid).without_augmentation()


def split_indices(num_samples: int, labels: Indices | None, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Positions of the two parts, each ascending; see ``split`` for the rule."""
    draws = keyed_uniform(ChanceKey(seed), "split", np.arange(num_samples))[:, 0]
    classes = np.zeros(num_samples, np.int64) if labels is None else labels
    order = np.lexsort((draws, classes))
    places = np.arange(num_samples + 1) * fraction + 1e-9  # 10 · 0.3 is a little under 3
    is_valid = np.zeros(num_samples, bool)
    is_valid[order] = np.diff(np.floor(places)) > 0
    for lost in np.setdiff1d(classes, classes[~is_valid]):
        is_valid[np.flatnonzero(classes == lost)[0]] = False
    if not is_valid.any() or is_valid.all():
        raise DataError(
            "a split leaves one part empty",
            where=f"valid_fraction = {fraction}",
            got=f"{num_samples} samples",
            expected="at least one sample in each part",
            fix="another valid_fraction, or name the validation data with valid = …",
        )
    return np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
