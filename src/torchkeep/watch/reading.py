"""A run's record for a program to read: as an iterator, or as an Arrow table that pandas and polars take."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .media import MediaStore
from .records import DETERMINISTIC_KINDS, Record, kept_batches, kept_records, read_records, superseded_after

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK_ROWS = 1 << 20
_SHARED = ("step", "epoch", "samples", "attempt", "time")


class RunRecord:
    """The record of one run; a loop over it gives every record that is not superseded.

    Raises:  RunFolderError for a folder without a record, or a damaged one
    """

    def __init__(self, path: Path):
        self.path = path
        self._media = MediaStore(path.parent)

    def __iter__(self) -> Iterator[Record]:
        return kept_records(self.path)

    def records(self, kinds: Collection[str] | None = None, *, superseded: bool = False) -> Iterator[Record]:
        """The records of some kinds. With ``superseded`` also those that a later attempt has taken back, so marked."""
        if not superseded:
            yield from kept_records(self.path, kinds)
            return
        last = superseded_after(self.path)
        for record in read_records(self.path):
            if kinds is None or record["kind"] in kinds:
                yield {**record, "superseded": record["step"] > last.get(record["attempt"], float("inf"))}

    def media(self, record: Record) -> bytes:
        """The file that a record names, checked.

        Raises:  RunFolderError where it is missing or damaged
        """
        return self._media.read(record["media"])

    def scalars(self, tags: Collection[str] | None = None, kinds: Collection[str] = DETERMINISTIC_KINDS) -> pa.Table:
        """One row a number: tag, value, step, epoch, samples, attempt, time (Unix s). ``.to_pandas()`` makes a frame.

        ``kinds=("timing", "system")`` are what was measured of the machine.
        """
        import pyarrow as pa

        rows = _Rows(tags)
        chunks = []
        for batch in kept_batches(self.path, kinds):
            rows.add(batch)
            if rows.size >= _CHUNK_ROWS:
                chunks.append(rows.taken())
        chunks.append(rows.taken())
        names = pa.array(list(rows.tags), pa.string())
        columns: dict[str, Any] = {
            "tag": pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array(chunk.pop("tag")), names)
                                     for chunk in chunks])
        }  # fmt: skip
        for name in ("value", *_SHARED):
            columns[name] = pa.chunked_array([pa.array(chunk.pop(name)) for chunk in chunks])
        return pa.table(columns)


class _Rows:
    """Gathers columns: what a line's numbers share is held once a line."""

    def __init__(self, tags: Collection[str] | None):
        self.tags: dict[str, int] = {}
        self.size = 0
        self._wanted = None if tags is None else set(tags)
        self._values: list[float] = []
        self._numbers: list[int] = []
        self._counts: list[int] = []
        self._shared: dict[str, list[Any]] = {name: [] for name in _SHARED}

    def add(self, batch: list[Record]) -> None:
        told = [record["values"] for record in batch]
        if self._wanted is not None:
            told = [{tag: value for tag, value in values.items() if tag in self._wanted} for values in told]
        tags = self.tags
        for tag in dict.fromkeys(chain.from_iterable(told)):
            tags.setdefault(tag, len(tags))
        self._numbers += map(tags.__getitem__, chain.from_iterable(told))
        self._values += chain.from_iterable(map(dict.values, told))
        self._counts += map(len, told)
        for name, column in self._shared.items():
            column += [record[name] for record in batch]
        self.size = len(self._values)

    def taken(self) -> dict[str, np.ndarray[Any, Any]]:
        """The columns so far; new ones begin."""
        counts = np.array(self._counts, np.int64)
        columns: dict[str, np.ndarray[Any, Any]] = {
            "tag": np.array(self._numbers, np.int32),
            "value": np.array(self._values, np.float64),
        }
        for name, column in self._shared.items():
            kind = np.float64 if name == "time" else np.int32 if name == "attempt" else np.int64
            columns[name] = np.repeat(np.array(column, kind), counts)
        self.size = 0
        self._values, self._numbers, self._counts = [], [], []
        self._shared = {name: [] for name in _SHARED}
        return columns
