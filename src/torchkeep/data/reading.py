"""One batch on its way from a dataset: rows are read by whoever has time, and what cannot be read is replaced by rule.

The work is the same whoever does it, so that threads, processes and the trainer itself give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..chance import ChanceKey, keyed_bits, keyed_seed
from ..contracts import INDEX, VALID, Batch, KeyedDataset
from ..errors import BadSampleError, DataError
from ..generators import keyed_generators
from .dataset import Filling, Indices, KeyedData, id_of, in_whole, whole
from .foreign import Foreign

Collate = Callable[[list[Any]], Any]
OnBad = Literal["raise", "substitute", "mask"]

_SUBSTITUTES = 16  # tried for one bad sample before the run gives up


class Task(NamedTuple):
    """A batch to be read: the numbers of its samples, and the key of their chance."""

    indices: Indices
    key: ChanceKey


@dataclass(frozen=True)
class Bad:
    """A sample that could not be read."""

    index: int
    id: str
    reason: str


class Read(NamedTuple):
    """A batch that was read, the samples in it, and what it took.

    Shapes:  indices (B,) int64; is_masked (B,) bool, rows of another sample that stand for none; None for no such row
    """

    batch: Any
    indices: Indices
    is_masked: np.ndarray[Any, Any] | None = None
    bad: tuple[Bad, ...] = ()
    read_s: float = 0.0
    hits: int = 0


@dataclass(frozen=True)
class Source:
    """What all batches of a loader have in common. With ``is_raw`` a user's collate is left for later: in threads it
    would draw from generators that others use meanwhile.
    """

    dataset: KeyedDataset
    collate: Collate | None = None
    on_bad: OnBad = "raise"
    is_raw: bool = False

    @cached_property
    def gathers(self) -> bool:
        """Whether a batch is one gather of what lies in memory, without a sample at a time."""
        dataset = whole(self.dataset)
        none = np.zeros(0, dtype=np.int64)
        return self.collate is None and isinstance(dataset, KeyedData) and dataset.begin(none, ChanceKey()) is None

    def read(self, task: Task) -> Read:
        """One batch, read here and now."""
        if self.gathers and self.on_bad == "raise":
            batch = self.dataset.read_batch(task.indices, task.key)
            if batch is not None:
                return Read(batch, task.indices)
        reading = Reading(self, task)
        reading.fill(0, reading.num_rows)
        return reading.finish()

    def complete(self, read: Read, key: ChanceKey) -> Batch:
        """The batch as it leaves the loader."""
        batch: Batch = read.batch
        if self.is_raw:
            batch = collated(self.dataset, read.batch, Task(read.indices, key), cast(Collate, self.collate))
        batch[INDEX] = torch.from_numpy(read.indices)
        if self.on_bad == "mask":
            is_masked = np.zeros(len(read.indices), bool) if read.is_masked is None else read.is_masked
            batch[VALID] = torch.from_numpy(~is_masked)
        return batch


class Reading:
    """A batch under way. Any thread may fill any rows; who fills the last ones calls ``finish``."""

    def __init__(self, source: Source, task: Task):
        self.source, self.task = source, task
        self._places = in_whole(source.dataset, task.indices)
        dataset: Any = whole(source.dataset)
        self._whole = dataset
        self._filling: Filling | None = None
        self._gathered: Batch | None = None
        begin = getattr(dataset, "begin", None)
        if source.collate is not None and not isinstance(dataset, Foreign):
            self._filling = Filling(dataset, self._places, task.key)
        elif begin is not None:
            self._filling = begin(self._places, task.key)
        self.num_rows = len(task.indices)
        self._bad: dict[int, Bad] = {}
        self._used: dict[int, int] = {}
        self._seconds: list[float] = []

    @property
    def is_gathered(self) -> bool:
        """Whether the batch is read at once, for its data lie in memory."""
        return self._filling is None

    def fill(self, start: int, stop: int) -> None:
        """Read the samples of some rows.

        Raises:  BadSampleError where one cannot be read and ``on_bad`` is "raise", or where no substitute was found
        """
        begun = time.perf_counter()
        if self._filling is None:
            self._gather()
        else:
            self._fill(self._filling, start, stop)
        self._seconds.append(time.perf_counter() - begun)

    def _fill(self, filling: Filling, start: int, stop: int) -> None:
        try:
            filling.fill(start, self._places[start:stop])
        except BadSampleError:
            if self.source.on_bad == "raise":
                raise
            for row in range(start, stop):
                self._fill_or_replace(filling, row)

    def _fill_or_replace(self, filling: Filling, row: int) -> None:
        try:
            filling.fill(row, self._places[row : row + 1])
        except BadSampleError as error:
            index = int(self.task.indices[row])
            self._bad[row] = Bad(index, id_of(self.source.dataset, index), str(error.got or error.what))
            self._replace(filling, row, index, error)

    def _replace(self, filling: Filling, row: int, index: int, error: BadSampleError) -> None:
        """Another sample in its place: the first that can be read, of an order keyed by the bad one."""
        size, key = len(self.source.dataset), self.task.key
        for attempt in range(_SUBSTITUTES):
            draw = keyed_bits(key, "substitute", np.array([index]), attempt) % np.uint64(size)
            other = draw.astype(np.int64)
            try:
                filling.fill(row, in_whole(self.source.dataset, other))
            except BadSampleError:
                continue
            self._used[row] = int(other[0])
            return
        raise DataError(
            f"no substitute for a bad sample could be read, {_SUBSTITUTES} were tried", where=error.where,
            got=error.got, fix="torchkeep survey DATA --bad lists all bad samples",
        ) from error  # fmt: skip

    def _gather(self) -> None:
        try:
            self._gathered = self._whole.read_batch(self._places, self.task.key)
        except BadSampleError:
            if self.source.on_bad == "raise":
                raise
        if self._gathered is None:  # its samples are read one by one
            self._filling = Filling(self._whole, self._places, self.task.key)
            self._fill(self._filling, 0, self.num_rows)

    def finish(self) -> Read:
        """The batch, once all rows are filled."""
        begun, indices, is_masked = time.perf_counter(), self.task.indices, None
        if self._used and self.source.on_bad == "substitute":
            indices = indices.copy()
            indices[list(self._used)] = list(self._used.values())
        elif self._used:
            is_masked = np.isin(np.arange(self.num_rows), list(self._used))
        batch, hits = self._made(indices)
        read_s = sum(self._seconds) + time.perf_counter() - begun
        return Read(batch, indices, is_masked, tuple(bad for _, bad in sorted(self._bad.items())), read_s, hits)

    def _made(self, indices: Indices) -> tuple[Any, int]:
        source, filling = self.source, self._filling
        if filling is None:
            return self._gathered, 0
        if source.is_raw:
            return filling.samples, 0
        if source.collate is not None:
            return collated(source.dataset, filling.samples, Task(indices, self.task.key), source.collate), 0
        return filling.finish(), filling.hits


def foreign_of(dataset: Any) -> Foreign | None:
    """The foreign dataset that this is, or is a part of."""
    found = whole(dataset)
    return found if isinstance(found, Foreign) else None


def collated(dataset: Any, samples: list[Any], task: Task, collate: Collate) -> Batch:
    """A user's batch of samples; what it draws from global generators is keyed by the batch.

    Raises:  DataError where it is none
    """
    foreign = foreign_of(dataset)
    with keyed_generators(keyed_seed(task.key, "collate", xxhash.xxh3_64_intdigest(task.indices.tobytes()))):
        made = as_tensors(collate(samples))
    if isinstance(made, Mapping):
        return dict(made)
    if isinstance(made, tuple | list) and foreign is not None and not (len(made) == len(samples) > 2):
        return foreign.named(tuple(made))
    if isinstance(made, Tensor):
        return {"input": made}
    raise DataError(
        "collate gave something that is no batch", where=getattr(collate, "__qualname__", repr(collate)),
        got=type(made).__name__, expected="a dict of tensors, or a tuple with a name for each part",
    )  # fmt: skip


def as_tensors(value: Any) -> Any:
    """The same with tensors in place of arrays."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value)
    return mapped(as_tensors, value)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A dict, list or tuple with each part changed; anything else as it is."""
    if isinstance(value, dict):
        return {name: change(inner) for name, inner in value.items()}
    return type(value)(change(inner) for inner in value) if type(value) in (list, tuple) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, also within dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def valid_rows(batch: Batch) -> Batch:
    """The rows that ``valid`` calls so, and no ``valid``.

    Raises:  DataError where there is none
    """
    if VALID not in batch:
        return batch
    valid = batch[VALID]
    rest = {name: value for name, value in batch.items() if name != VALID}
    if bool(valid.all()):
        return rest
    if not bool(valid.any()):
        raise DataError("no sample of a batch can be read", where=f"samples {batch[INDEX].tolist()[:16]}",
                        expected="one at least", fix="torchkeep survey DATA --bad")  # fmt: skip
    return {name: _rows(value, valid) for name, value in rest.items()}


def _rows(value: Any, valid: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[valid]
    if isinstance(value, list):
        return [item for item, is_kept in zip(value, valid.tolist(), strict=True) if is_kept]
    return mapped(lambda inner: _rows(inner, valid), value)
