"""What all datasets of this wing are: a length, samples as dicts, batches, a schema and a fingerprint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import numpy as np
import xxhash
from torch.utils.data import Dataset

from ..chance import ChanceKey
from ..contracts import Batch, Field, KeyedDataset, Sample, Schema
from ..errors import DataError
from .samples import stack

Indices = np.ndarray[Any, np.dtype[np.int64]]
D = TypeVar("D")


class Filling:
    """A batch whose samples are read one by one, in any order and by any thread. ``hits`` counts those from a cache."""

    hits = 0

    def __init__(self, dataset: Any, indices: Indices, key: ChanceKey):
        self.dataset, self.key = dataset, key
        self.samples: list[Any] = [None] * len(indices)

    def fill(self, start: int, indices: Indices) -> None:
        """Read samples into the rows from ``start`` on.

        Raises:  BadSampleError where one cannot be read; its row can be filled by another sample
        """
        for row, index in enumerate(indices.tolist(), start):
            self.samples[row] = self.dataset.read(index, self.key)

    def finish(self) -> Batch:
        """The batch, once all rows are filled."""
        return dict(getattr(self.dataset, "collate", stack)(self.samples))


class KeyedData(Dataset[Sample]):
    """The base of the datasets here. They say how a sample is read; what else they can do better, they override."""

    schema: Schema
    where: str = ""
    threads = False  # whether reading releases the GIL

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, key: ChanceKey) -> Sample:
        """One sample, its chance drawn from ``key``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What names the content of all samples."""

    def __getitem__(self, index: int) -> Sample:
        """The sample under the chance of seed 0, epoch 0; torchkeep's Loader draws anew in each epoch."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.read(index % len(self), ChanceKey())

    def begin(self, indices: Indices, key: ChanceKey) -> Filling | None:
        """A batch to be filled row by row; None where ``read_batch`` gathers it at once."""
        return Filling(self, indices, key)

    def read_batch(self, indices: Indices, key: ChanceKey) -> Batch | None:
        """Shapes:  indices (B,) int64 → tensors (B, …); None where samples are to be read one by one"""
        filling = self.begin(indices, key)
        assert filling is not None, "a dataset that gathers says how"
        filling.fill(0, indices)
        return filling.finish()

    def collate(self, samples: list[Sample]) -> Batch:
        """A batch of samples: what ``collate_fn`` of a plain DataLoader needs. Ids stay behind."""
        return stack([{name: value for name, value in sample.items() if name != "id"} for sample in samples])

    def without_augmentation(self) -> Any:
        """The same samples without what training adds by chance."""
        return self

    def learned_from(self, indices: Indices) -> Any:
        """The same samples, with what is learned from data (statistics, vocabularies) learned from these alone."""
        return self

    def id_of(self, index: int) -> str:
        return f"row {index}"

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """A value of each sample, (N,), that is neither input nor target: what splits by group or time go by.

        Raises:  DataError where there is no such column
        """
        raise DataError("these data have no columns", where=f"{self.where}: {name!r}", expected="a table")

    @property
    def labels(self) -> Indices | None:
        """Class of each sample, (N,) int64; None where there is none."""
        return None

    @property
    def lengths(self) -> np.ndarray[Any, Any] | None:
        """How long each sample is, (N,), in any unit: what buckets go by; None where all are alike."""
        return None


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

    def collate(self, samples: list[Any]) -> Batch:
        make = getattr(self.dataset, "collate", stack)
        return dict(make(samples))

    def learned_from(self, indices: Indices) -> Part:
        """The same samples, with what is learned from data learned from these alone."""
        learn = getattr(self.dataset, "learned_from", None)
        return self if learn is None else Part(learn(self.indices[indices]), self.indices)

    def id_of(self, index: int) -> str:
        name = getattr(self.dataset, "id_of", str)
        return str(name(int(self.indices[index])))

    def column(self, name: str) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = whole_column(self.dataset, name)[self.indices]
        return values

    @property
    def labels(self) -> Indices | None:
        """Class of each sample, (n,) int64; None where the whole has none."""
        labels = getattr(self.dataset, "labels", None)
        return None if labels is None else labels[self.indices]

    @property
    def lengths(self) -> np.ndarray[Any, Any] | None:
        lengths = getattr(self.dataset, "lengths", None)
        return None if lengths is None else lengths[self.indices]


def whole_column(dataset: Any, name: str) -> np.ndarray[Any, Any]:
    """A column of a dataset, whether or not it is of this house.

    Raises:  DataError where it has none
    """
    if not hasattr(dataset, "column"):
        raise DataError("these data have no columns", where=repr(name), got=type(dataset).__name__, expected="a table")
    found: np.ndarray[Any, Any] = dataset.column(name)
    return found


def target_of(dataset: KeyedData | None) -> Field | None:
    """The field of a dataset's labels, or of its numbers to be predicted."""
    if dataset is None:
        return None
    return next((dataset.schema[name] for name in ("label", "target") if name in dataset.schema), None)


def whole(dataset: Any) -> Any:
    """The dataset that this is, or is a part of."""
    while isinstance(dataset, Part):
        dataset = dataset.dataset
    return dataset


def in_whole(dataset: Any, indices: Indices) -> Indices:
    """Where in the whole dataset these samples of a part are: what their chance is keyed by."""
    while isinstance(dataset, Part):
        indices, dataset = dataset.indices[indices], dataset.dataset
    return indices


def id_of(dataset: Any, index: int) -> str:
    """What a sample is called."""
    return str(dataset.id_of(index)) if hasattr(dataset, "id_of") else f"sample {index}"


def whole_of(like: Any, kind: type[D], what: str, where: str) -> D | None:
    """The dataset behind ``like``, which may be a part of it.

    Raises:  DataError where it is of another kind than the one that takes after it
    """
    found = whole(like)
    if found is None or isinstance(found, kind):
        return found
    raise DataError(
        f"this is {what}, and the training data are not", where=where, got=what,
        expected=f"data as in training, a {type(found).__name__}",
    )  # fmt: skip
