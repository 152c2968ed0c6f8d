"""All that a survey reads of one split: columns over its samples, and those that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..chance import ChanceKey, keyed_uniform
from ..errors import DataError
from .dataset import Indices, Part
from .duplicates import U64
from .foreign import Foreign, as_dataset
from .frames import is_category, is_date, is_number
from .readers import Reader, Reading, reader_of
from .streams import Stream
from .tables import Table
from .text import TextBlocks

_CHUNK = 64
_MANY_CLASSES = 50
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be read, and why; ``where`` names it with its source."""

    id: str
    where: str
    what: str
    got: str


@dataclass
class Contents:
    """What was read of one split: n samples, and those that are bad.

    Shapes:  positions (n,) int64 in ``reader``; digests (n, 2) uint64; bands (n, B) uint64, 0 where a sample has none;
             bits (n, 2) uint64; measures and categories (n,)
    """

    reader: Reader
    kind: str
    num_samples: int
    positions: Indices
    labels: list[tuple[str, ...]]
    digests: U64
    bits: U64
    bands: U64 | None = None
    measures: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    categories: dict[str, Any] = field(default_factory=dict)
    moments: tuple[list[float], list[float]] | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)
    bad_labels: list[tuple[str, ...]] = field(default_factory=list)
    num_bytes: int | None = None

    def id_of(self, row: int) -> str:
        return self.reader.id_of(int(self.positions[row]))


@dataclass(frozen=True)
class Rows:
    """A table as it stands, also one that training refuses; ``target`` is a column of it, or None."""

    frame: Any
    where: str
    target: str | None = None
    left_out: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()  # categories although they are numbers
    id: str | None = None

    def __len__(self) -> int:
        return int(self.frame.num_rows)

    def id_of(self, index: int) -> str:
        return str(self.frame[self.id][index]) if self.id in self.frame.column_names else f"row {index}"


def read_contents(dataset: Any, limit: int | None, progress: Callable[[int], None]) -> Contents:
    """Read the samples of one split, of whatever kind; with ``limit`` so many of them, chosen by keyed chance."""
    held, positions = _unwrapped(dataset, limit)
    total = len(positions)
    if limit is not None and limit < total:
        draws = keyed_uniform(ChanceKey(), "survey", positions)[:, 0]
        positions = positions[np.sort(np.argsort(draws, kind="stable")[:limit])]
    if not isinstance(held, Rows):
        return _of_samples(reader_of(held), positions, total, progress)
    progress(len(positions))
    return _of_rows(held, positions, total)


def _unwrapped(dataset: Any, limit: int | None) -> tuple[Any, Indices]:
    """The dataset behind parts, without augmentation, and the positions in it."""
    held = dataset if isinstance(dataset, Rows) else as_dataset(dataset)
    positions = np.arange(len(held))
    while isinstance(held, Part):
        positions, held = held.indices[positions], held.dataset
    if isinstance(held, Table):
        known, options = held.encoding, held._options
        raw = Rows(held._frame, held.where, known.target, options.drop, options.categories, options.id)
        return raw, held.rows[positions]
    if isinstance(held, Stream):  # it has no sample by number: those that are looked at are held
        count = min(len(held), limit or len(held))
        held = Foreign([sample for _, sample in zip(range(count), held.samples(ChanceKey()), strict=False)])
        return held, np.arange(count)
    if isinstance(held, TextBlocks):
        return held.texts, np.arange(len(held.texts))
    return getattr(held, "without_augmentation", lambda: held)(), positions


def _of_samples(reader: Reader, positions: Indices, total: int, progress: Callable[[int], None]) -> Contents:
    good: list[int] = []
    readings: list[Reading] = []
    nothing = np.empty((0, 2), np.uint64)
    made = Contents(reader, reader.kind, total, positions, [], nothing, nothing)
    for chunk, results in _read_in_chunks(reader, positions):
        for index, result in zip(chunk.tolist(), results, strict=True):
            if isinstance(result, Reading):
                good.append(index)
                readings.append(result)
            else:
                made.bad.append(BadSample(reader.id_of(index), reader.where(index), result.what, result.got))
                made.bad_labels.append(reader.labels_of(index))
        progress(len(chunk))
    made.positions, made.num_bytes = np.array(good, np.int64), reader.num_bytes(positions)
    made.labels = [reader.labels_of(i) if r.labels is None else r.labels for i, r in zip(good, readings, strict=True)]
    _stack(made, readings)
    return made


def _read_in_chunks(reader: Reader, positions: Indices) -> Iterator[tuple[Indices, list[Reading | DataError]]]:
    def tried(index: int) -> Reading | DataError:
        try:
            return reader.read(index)
        except DataError as error:
            return error

    def read(chunk: Indices) -> list[Reading | DataError]:
        return [tried(index) for index in chunk.tolist()]

    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    if not getattr(reader.held, "threads", False):
        yield from ((chunk, read(chunk)) for chunk in chunks)
        return
    pool = ThreadPoolExecutor()
    try:
        yield from zip(chunks, pool.map(read, chunks), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _stack(made: Contents, readings: list[Reading]) -> None:
    made.digests = np.frombuffer(b"".join(r.digest for r in readings), np.uint64).reshape(-1, 2)
    made.bits = np.array([np.zeros(2) if r.bits is None else r.bits for r in readings], np.uint64).reshape(-1, 2)
    width = next((len(r.bands) for r in readings if r.bands is not None), 0)
    without = np.zeros(width, np.uint64)
    made.bands = np.array([without if r.bands is None else r.bands for r in readings]) if width else None
    for name in dict.fromkeys(name for r in readings for name in r.measures):
        made.measures[name] = np.array([r.measures.get(name, np.nan) for r in readings])
    for name in dict.fromkeys(name for r in readings for name in r.categories):
        made.categories[name] = pa.array([r.categories.get(name) for r in readings])
    moments = [r.moments for r in readings if r.moments is not None]
    if moments and len({held.shape for held in moments}) == 1:
        mean, square = np.mean(moments, axis=0)
        made.moments = mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
    for row, reading in enumerate(readings):
        for note in reading.notes:
            made.notes.setdefault(note, []).append(made.id_of(row))


def _of_rows(rows: Rows, positions: Indices, total: int) -> Contents:
    frame = rows.frame.take(pa.array(positions))
    names = [name for name in frame.column_names if name not in (rows.target, rows.id, *rows.left_out)]
    nothing = np.zeros((len(positions), 2), np.uint64)
    made = Contents(Reader(rows), "rows", total, positions, [()] * len(positions), _digests_of(frame, names), nothing)
    made.num_bytes = int(frame.nbytes)
    for name in names:
        _look_at_column(made, name, frame[name], name in rows.forced)
    if rows.target is not None and rows.target in frame.column_names:
        _look_at_target(made, rows.target, frame[rows.target])
    if rows.id in frame.column_names:
        found = pc.value_counts(frame[rows.id].combine_chunks())
        twice = pc.filter(found.field("values"), pc.greater(found.field("counts"), 1)).to_pylist()
        if twice:
            made.notes[f"ids of column {rows.id!r} that name several rows"] = [str(held) for held in twice]
    return made


def _look_at_column(made: Contents, name: str, column: Any, is_forced: bool) -> None:
    kind = column.type
    if is_forced or is_category(kind):
        made.categories[name] = pc.cast(column, pa.string()).combine_chunks()
    elif is_number(kind) or is_date(kind):
        held = pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64()) if is_date(kind) else column
        values = pc.fill_null(pc.cast(held, pa.float64(), safe=False), float("nan")).to_numpy()
        values = values / _DAY_US if is_date(kind) else values
        infinite = np.isinf(values)
        if infinite.any():
            made.notes[f"infinite numbers in column {name!r}"] = list(
                map(made.id_of, np.flatnonzero(infinite).tolist())
            )
        made.measures[f"{name}, days since 1970" if is_date(kind) else name] = np.where(infinite, np.nan, values)


def _look_at_target(made: Contents, name: str, column: Any) -> None:
    is_few = pa.types.is_integer(column.type) and pc.count_distinct(column).as_py() <= _MANY_CLASSES
    if is_number(column.type) and not is_few:
        _look_at_column(made, name, column, False)
    else:
        texts = pc.cast(column, pa.string()).to_pylist()
        made.labels = [() if text is None else (text,) for text in texts]


def _digests_of(frame: Any, names: list[str]) -> U64:
    """A hash of each row over these columns. Shapes: (N, 2)."""
    texts = [pc.cast(frame[name], pa.string()) for name in names if not pa.types.is_nested(frame[name].type)]
    if not texts:
        return np.arange(2 * frame.num_rows, dtype=np.uint64).reshape(-1, 2)
    joined = pc.binary_join_element_wise(*texts, "\x1f", null_handling="replace", null_replacement="\x1e")
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in joined.to_pylist())
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)
