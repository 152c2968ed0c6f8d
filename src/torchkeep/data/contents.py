"""All that a survey reads of one split: who each sample is, what its copies are found by, and columns to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ..chance import ChanceKey, keyed_uniform
from ..contracts import Json
from ..errors import DataError
from .dataset import Indices, Part
from .duplicates import U64
from .foreign import Foreign, as_dataset
from .frames import as_texts, is_category, is_date, is_number
from .readers import Reading, reader_of
from .streams import Stream
from .tables import Table
from .text import TextBlocks

_MANY_CLASSES = 50
_MOST_WORDS = 10


@dataclass(frozen=True)
class Member:
    """A sample of a split; ``index`` is its place in the dataset that the split is, or is a part of."""

    split: str
    index: int
    id: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class BadSample(Member):
    """A sample that cannot be read, and why; ``where`` names it with its source."""

    where: str
    what: str
    got: str


@dataclass(eq=False)
class Split:
    """One split of ``num_samples``. Those that were read have a row in ``members`` and what follows it.

    A column holds numbers, float64 with NaN where one is missing, or texts, a pyarrow.Array. ``mean`` and ``std`` are
    those of each channel, white or full scale being 1, each sample alike.
    """

    reader: Any
    num_samples: int
    num_bytes: int | None
    members: list[Member] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    hashes: list[U64 | None] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.reader.kind)

    @property
    def num_read(self) -> int:
        return len(self.members) + len(self.bad)

    @property
    def classes(self) -> Counter[str]:
        """How often each class comes, also in samples that cannot be read; the most frequent first."""
        found = Counter(label for member in [*self.members, *self.bad] for label in member.labels)
        return Counter(dict(found.most_common()))

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Of each number count, missing, min, median, max, mean and std."""
        return {name: _spread(held) for name, held in self.columns.items() if isinstance(held, np.ndarray)}

    @property
    def categories(self) -> dict[str, dict[str, Any]]:
        """Of each column of texts the number of different ones, those missing, and the most frequent."""
        return {name: _words(held) for name, held in self.columns.items() if not isinstance(held, np.ndarray)}

    def to_json(self) -> Json:
        names = ("kind", "num_samples", "num_read", "num_bytes", "classes", "measures", "categories", "mean", "std")
        return {name: getattr(self, name) for name in names} | {"bad": [asdict(sample) for sample in self.bad]}


def word_counts(words: Any) -> Counter[str]:
    """How often each text of a column comes, the most frequent first."""
    return Counter(dict(Counter(word for word in words.to_pylist() if word is not None).most_common()))


def _words(words: Any) -> dict[str, Any]:
    found = word_counts(words)
    return {"values": len(found), "missing": words.null_count, "top": dict(found.most_common(_MOST_WORDS))}


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    known = values[np.isfinite(values)]
    counts = {"count": len(known), "missing": len(values) - len(known)}
    known = known if len(known) else np.zeros(1)
    low, median, high = np.quantile(known, [0, 0.5, 1]).tolist()
    return counts | {"min": low, "median": median, "max": high, "mean": float(known.mean()), "std": float(known.std())}


@dataclass(frozen=True)
class Rows:
    """A table as it stands, also one that training refuses; ``target`` is a column of it, or None."""

    frame: Any
    where: str
    target: str | None = None
    left_out: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()  # categories although they are numbers
    id: str | None = None
    kind: str = "rows"

    def __len__(self) -> int:
        return int(self.frame.num_rows)

    def id_of(self, index: int) -> str:
        return str(self.frame[self.id][index]) if self.id in self.frame.column_names else f"row {index}"


def looked_at(dataset: Any, limit: int | None) -> tuple[Any, Indices, int]:
    """What a dataset holds, behind its parts and without augmentation, the positions in it, and their whole number.

    With ``limit`` so many, chosen by keyed chance; of a stream, which has no samples by number, the first ones.
    """
    held = dataset if isinstance(dataset, Rows) else as_dataset(dataset)
    if isinstance(held, Stream):
        first = list(islice(held.samples(ChanceKey()), limit or len(held)))
        return Foreign(first), np.arange(len(first)), len(held)
    positions = np.arange(len(held))
    while isinstance(held, Part):
        positions, held = held.indices[positions], held.dataset
    if isinstance(held, Table):
        told, positions = held._options, held.rows[positions]
        held = Rows(held._frame, held.where, held.encoding.target, told.drop, told.categories, told.id)
    elif isinstance(held, TextBlocks):
        held, positions = held.texts, np.arange(len(held.texts))
    elif hasattr(held, "without_augmentation"):
        held = held.without_augmentation()
    total = len(positions)
    if limit is not None and limit < total:
        draws = keyed_uniform(ChanceKey(), "survey", positions)[:, 0]
        positions = positions[np.sort(np.argsort(draws, kind="stable")[:limit])]
    return held, positions, total


def read_split(name: str, held: Any, positions: Indices, total: int, progress: Callable[[int], None]) -> Split:
    """Read these samples, of whatever kind."""
    if isinstance(held, Rows):
        made = _of_rows(name, held, positions, total)
        progress(len(positions))
        return made
    reader = reader_of(held)
    made, readings = Split(reader, total, reader.num_bytes(positions)), list[Reading]()
    source, kept = getattr(held, "where", type(held).__name__), getattr(held, "_labels", None)

    def read(index: int) -> Reading | DataError:
        try:
            return reader.read(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = (pool.map if getattr(held, "threads", False) else map)(read, positions.tolist())
        for index, found in zip(positions.tolist(), results, strict=True):
            progress(1)
            id, labels = reader.id_of(index), reader.labels_of(index)
            if isinstance(found, DataError):
                made.bad.append(BadSample(name, index, id, labels, f"{source}: {id}", found.what, found.got))
                continue
            made.members.append(Member(name, index, id, labels if found.labels is None else found.labels))
            readings.append(found)
            if found.note:
                made.notes.setdefault(found.note, []).append(id)
    made.digests, made.hashes = [r.digest for r in readings], [r.hash for r in readings]
    for column in dict.fromkeys(column for r in readings for column in r.values):
        values = [r.values.get(column) for r in readings]
        has_texts = any(isinstance(value, str) for value in values)
        made.columns[column] = pa.array(values, pa.string()) if has_texts else np.array(values, np.float64)
    if kept is not None and kept.field.kind == "number":
        made.columns["target"] = np.array([kept.of(member.index) for member in made.members])
    moments = [r.moments for r in readings if r.moments is not None]
    if moments and len({found.shape for found in moments}) == 1:
        mean, square = np.mean(moments, axis=0)
        made.mean, made.std = mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()
    return made


def _of_rows(split: str, rows: Rows, positions: Indices, total: int) -> Split:
    frame = rows.frame.take(pa.array(positions))
    made = Split(rows, total, int(frame.nbytes), hashes=[None] * len(positions))
    names = [name for name in frame.column_names if name not in (rows.target, rows.id, *rows.left_out)]
    columns = {name: _column_of(frame[name], name in rows.forced) for name in names}
    made.columns = {name: column for name, column in columns.items() if column is not None}
    made.digests = _digests_of(frame, list(made.columns))
    labels: list[tuple[str, ...]] = [()] * len(positions)
    if rows.target in frame.column_names:
        target = frame[rows.target]
        is_few = pa.types.is_integer(target.type) and pc.count_distinct(target).as_py() <= _MANY_CLASSES
        column = _column_of(target, is_few)
        if isinstance(column, np.ndarray):
            made.columns[str(rows.target)] = column
        elif column is not None:
            labels = [() if text is None else (text,) for text in column.to_pylist()]
    places = zip(positions.tolist(), labels, strict=True)
    made.members = [Member(split, index, rows.id_of(index), held) for index, held in places]
    return made


def _column_of(column: Any, is_forced: bool) -> Any:
    """Texts, or numbers, dates being days since 1970 and infinity NaN; None for a type that is neither."""
    if is_forced or is_category(column.type):
        return as_texts(column)
    if is_date(column.type):
        column = pc.cast(pc.cast(column, pa.date32(), safe=False), pa.int32())
    elif not is_number(column.type):
        return None
    values = pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def _digests_of(frame: Any, names: list[str]) -> list[bytes]:
    """A digest of each row over these columns; without any no row is like another."""
    texts = [pc.cast(frame[name], pa.string()) for name in names] or [pa.array(map(str, range(frame.num_rows)))]
    joined = pc.binary_join_element_wise(*texts, "\x1f", null_handling="replace", null_replacement="\x1e")
    return [xxhash.xxh3_128_digest(text.encode()) for text in joined.to_pylist()]
