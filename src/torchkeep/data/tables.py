"""Tables of numbers and categories, converted once; a batch is one gather per tensor.

Statistics come from the training rows alone; validation and test take them over with ``like=``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from ..chance import ChanceKey
from ..contracts import Batch, Field, Json, Sample, Schema
from ..errors import DataError, nearest
from .arrays import bytes_of

Frame = Any
"""A pyarrow.Table; pyarrow has no types."""
Indices = np.ndarray[Any, np.dtype[np.int64]]
Task = Literal["auto", "classification", "regression"]

MISSING = ("", "?", "NA", "NaN", "nan")
PARQUET = (".parquet", ".pq")

_MAX_INTEGER_CLASSES = 50


def column_names(path: Path) -> list[str]:
    """The columns of a CSV or Parquet file, without reading its rows.

    Raises:  DataError if the file cannot be read as such
    """
    return list(_parquet_schema(path).names) if path.suffix.lower() in PARQUET else _csv_header(path)


def read_frame(path: Path) -> Frame:
    """A CSV, TSV or Parquet file as a pyarrow.Table.

    A CSV's cells lose the blanks around them; "", "?", "NA", "NaN" and "nan" are missing; a column is of whole numbers,
    floats, bools or texts, whichever holds all of its cells.
    Raises:  DataError if the file is missing, empty or not of this form
    """
    frame = _read_parquet(path) if path.suffix.lower() in PARQUET else _read_csv(path)
    if not frame.num_rows:
        raise DataError("this table is empty", where=path, got="0 rows", expected="a row for each sample")
    return frame


def _unreadable(path: Path, error: Exception) -> DataError:
    what = "this table is missing" if isinstance(error, FileNotFoundError) else "this table cannot be read"
    near = ""
    if isinstance(error, FileNotFoundError) and path.parent.is_dir():
        near = nearest(path.name, [found.name for found in path.parent.iterdir()])
    return DataError(what, where=path, got=str(error).splitlines()[0], expected="a CSV or Parquet file", fix=near)


def _parquet_schema(path: Path) -> Any:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _read_parquet(path: Path) -> Frame:
    try:
        with path.open("rb") as file:  # by itself pyarrow would read "key=value" in the folder's name as a column
            return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=_delimiter(path)), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from None
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        got = f"{twice[0]!r} more than once" if twice else "no first line"
        raise DataError("this table's header cannot be used", where=path, got=got, expected="a name for each column")
    return names


def _read_csv(path: Path) -> Frame:
    names = _csv_header(path)
    # every cell as text first: a blank before a number or a "?" among numbers must not decide its column's type
    convert = pcsv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    parse = pcsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
    try:
        read = pcsv.ReadOptions(column_names=names, skip_rows=1)
        frame = pcsv.read_csv(path, read, parse, convert)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    return pa.table({name: _typed(frame[name]) for name in names})


def _typed(texts: Any) -> Any:
    trimmed = pc.utf8_trim_whitespace(texts)
    cells = pc.if_else(pc.is_in(trimmed, pa.array(MISSING)), pa.scalar(None, pa.string()), trimmed)
    for kind in (pa.int64(), pa.float64()):
        try:
            return pc.cast(cells, kind)
        except pa.ArrowInvalid:
            continue
    words = pc.utf8_lower(cells)
    is_bool = pc.all(pc.is_in(words, pa.array(["true", "false", None]))).as_py()
    return pc.equal(words, "true") if is_bool else cells


def require_column(frame: Frame, name: str, where: object, setting: str) -> Any:
    """A column by name.

    Raises:  DataError listing the columns there are; ``setting`` is the key that names another one, if any does
    """
    if name not in frame.column_names:
        raise DataError(
            f"this table has no column {name!r}",
            where=where,
            got=f"columns {', '.join(frame.column_names)}",
            expected=f"a column {name!r}",
            fix=nearest(name, frame.column_names) or (f"name it with {setting} = …" if setting else ""),
        )
    return frame[name]


@dataclass(frozen=True)
class TableEncoding:
    """What was learned from the training rows, JSON values only: it is all that new rows need."""

    target: str
    task: Literal["classification", "regression"]
    numbers: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    categories: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Numbers in use for each category: the known values, and 0 for missing or unseen."""
        return tuple(len(words) + 1 for words in self.vocabularies)

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def from_json(data: Json) -> TableEncoding:
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list | tuple) else value for name, value in data.items()
        }
        return TableEncoding(**{**read, "vocabularies": tuple(tuple(words) for words in data["vocabularies"])})


class Table(Dataset[Sample]):
    """Rows of a CSV or Parquet file, or of a pyarrow.Table: numbers standardised, categories numbered.

    A missing number becomes the mean, which is 0; a missing or unseen category becomes 0. Statistics and numbering are
    those of ``rows`` (all by default), or those of ``like``, a Table or its encoding. With task "auto" a target of
    texts, bools or at most 50 different whole numbers is a label, anything else is a number.

    Shapes:  "numbers" float32 (F,), "categories" int64 (G,), each where there are any; "label" int or "target" float32
    Raises:  DataError for a column that is missing or cannot be used, a row without a target, an unknown class
    """

    threads = False

    def __init__(
        self,
        source: str | Path | Frame,
        target: str,
        *,
        task: Task = "auto",
        like: Table | TableEncoding | Any = None,
        rows: Sequence[int] | Indices | None = None,
        drop: Sequence[str] = (),
    ):
        self.where = str(source) if isinstance(source, str | Path) else "a table in memory"
        frame = read_frame(Path(source)) if isinstance(source, str | Path) else source
        self._frame = frame
        self._drop = tuple(drop)
        self.rows = np.arange(frame.num_rows) if rows is None else np.asarray(rows, dtype=np.int64)
        known = _encoding_of(like, self.where)
        for name in drop if known is None else ():
            require_column(frame, name, self.where, "drop")
        require_column(frame, target, self.where, "target")
        chosen = frame if rows is None else frame.take(pa.array(self.rows))
        _check_target(chosen[target], target, self.rows, self.where)
        self.encoding = known or _learn(chosen, target, task, set(drop), self.where)
        self.columns = _encode(chosen, target, self.encoding, self.rows, self.where)
        self.schema = _schema_of(self.encoding)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: int(column[index]) if name == "label" else column[index] for name, column in self.columns.items()}

    def read(self, index: int, key: ChanceKey) -> Sample:
        """One row. Nothing here is random."""
        return self[index]

    def read_batch(self, indices: np.ndarray[Any, Any], key: ChanceKey) -> Batch:
        """Shapes: indices (B,) int64 → "numbers" (B, F), "categories" (B, G), "label" or "target" (B,)."""
        positions = torch.from_numpy(indices)
        return {name: torch.index_select(column, 0, positions) for name, column in self.columns.items()}

    def fingerprint(self) -> str:
        """xxh3 of the encoded columns and of what encodes them."""
        digest = xxhash.xxh3_128(repr(self.encoding).encode())
        for name, column in self.columns.items():
            digest.update(f"{name}|{tuple(column.shape)}|".encode())
            digest.update(bytes_of(column))
        return str(digest.hexdigest())

    def without_augmentation(self) -> Table:
        """Itself: there is none."""
        return self

    def id_of(self, index: int) -> str:
        """The row of the file, counted from 0."""
        return f"row {self.rows[index]}"

    def divided(self, train: Indices, valid: Indices) -> tuple[Table, Table]:
        """Two tables of these samples; the statistics are those of the first alone."""
        task, target = self.encoding.task, self.encoding.target
        first = Table(self._frame, target, task=task, rows=self.rows[train], drop=self._drop)
        second = Table(self._frame, target, rows=self.rows[valid], like=first)
        first.where = second.where = self.where
        return first, second

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """For each of the G categories how many numbers are in use, 0 for missing or unseen included."""
        return self.encoding.cardinalities

    @property
    def labels(self) -> np.ndarray[Any, Any] | None:
        """Class of each sample, (N,) int64; None for a regression."""
        return self.columns["label"].numpy() if "label" in self.columns else None


def _encoding_of(like: Any, where: str) -> TableEncoding | None:
    if like is None or isinstance(like, TableEncoding):
        return like
    whole = getattr(like, "dataset", like)
    encoding = getattr(whole, "encoding", None)
    if not isinstance(encoding, TableEncoding):
        raise DataError(
            "this is a table, and the training data are none",
            where=where,
            got="a table",
            expected=f"data as in training, a {type(whole).__name__}",
        )
    return encoding


def _is_number(kind: Any) -> bool:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numeric or pa.types.is_null(kind))


def _is_category(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_category(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind))


def _check_target(column: Any, target: str, rows: Indices, where: str) -> None:
    missing = pc.is_null(column, nan_is_null=True) if pa.types.is_floating(column.type) else pc.is_null(column)
    first = pc.index(missing, True).as_py()
    if first >= 0:
        raise DataError(
            "a target is missing",
            where=f"{where}: column {target!r}, row {rows[first]} (counted from 0)",
            got=f"{pc.sum(missing).as_py():,} of {len(column):,} rows without a target",
            expected="a target in each row",
            fix="remove these rows",
        )


def _learn(frame: Frame, target: str, task: Task, dropped: set[str], where: str) -> TableEncoding:
    """Statistics, vocabularies and classes of these rows."""
    features = [name for name in frame.column_names if name != target and name not in dropped]
    for name in features:
        if not _is_number(frame[name].type) and not _is_category(frame[name].type):
            raise DataError(
                "a column cannot be used",
                where=f"{where}: column {name!r}",
                got=f"type {frame[name].type}",
                expected="numbers, texts or bools",
                fix=f'drop = ["{name}"]',
            )
    numbers = [name for name in features if _is_number(frame[name].type)]
    categories = [name for name in features if name not in numbers]
    if not features:
        raise DataError("this table has no column beside its target", where=where, got=f"columns {frame.column_names}")
    moments = [_moments(_floats(frame[name], name, where)) for name in numbers]
    found = _task_of(frame[target], task, f"{where}: column {target!r}")
    return TableEncoding(
        target=target,
        task=found,
        numbers=tuple(numbers),
        means=tuple(mean for mean, _ in moments),
        deviations=tuple(deviation for _, deviation in moments),
        categories=tuple(categories),
        vocabularies=tuple(tuple(_distinct(_texts(frame[name]))) for name in categories),
        classes=tuple(_classes_of(frame[target])) if found == "classification" else (),
    )


def _task_of(column: Any, task: Task, where: str) -> Literal["classification", "regression"]:
    if not _is_number(column.type) and not _is_category(column.type):
        raise DataError(
            "this target cannot be used", where=where, got=f"type {column.type}", expected="texts or numbers"
        )
    if task == "regression" and not _is_number(column.type):
        raise DataError("this target is no number", where=where, got=f"type {column.type}", expected="numbers")
    if task != "auto":
        return task
    if _is_category(column.type):
        return "classification"
    few = pa.types.is_integer(column.type) and pc.count_distinct(column).as_py() <= _MAX_INTEGER_CLASSES
    return "classification" if few else "regression"


def _floats(column: Any, name: str, where: str) -> np.ndarray[Any, Any]:
    """(N,) float64, NaN where missing."""
    try:
        values = np.asarray(pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy())
    except pa.ArrowException as error:
        raise DataError(
            "a column of numbers holds something else",
            where=f"{where}: column {name!r}",
            got=str(error).splitlines()[0],
            expected="numbers, as in the training table",
        ) from None
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        raise DataError(
            "a number is infinite",
            where=f"{where}: column {name!r}, sample {row}",
            got=values[row],
            expected="a finite number, or an empty cell where it is missing",
        )
    return values


def _moments(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 1.0
    return float(known.mean()), float(known.std()) or 1.0  # a constant column becomes 0, not NaN


def _texts(column: Any) -> Any:
    """Categories and classes as texts: 3 → "3", 3.0 → "3", True → "true"."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if pa.types.is_floating(column.type) and pc.all(pc.equal(column, pc.floor(column))).as_py():
        column = pc.cast(column, pa.int64())
    return pc.cast(column, pa.string()).combine_chunks()


def _distinct(texts: Any) -> list[str]:
    return sorted(word for word in pc.unique(texts).to_pylist() if word is not None)


def _classes_of(column: Any) -> list[str]:
    words = _distinct(_texts(column))
    # "10" comes after "9" among numbers
    return sorted(words, key=float) if _is_number(column.type) else words


def encode_inputs(frame: Frame, known: TableEncoding, where: str) -> dict[str, Tensor]:
    """The columns that a model takes, as they were encoded for its training; rows need no target.

    Shapes:  "numbers" float32 (N, F), "categories" int64 (N, G), each where there are any
    Raises:  DataError for a missing column or one of another type
    """
    columns: dict[str, Tensor] = {}
    if known.numbers:
        columns["numbers"] = _encode_numbers(frame, known, where)
    if known.categories:
        columns["categories"] = _encode_categories(frame, known, where)
    return columns


def _encode(frame: Frame, target: str, known: TableEncoding, rows: Indices, where: str) -> dict[str, Tensor]:
    columns = encode_inputs(frame, known, where)
    if known.task == "regression":
        columns["target"] = torch.from_numpy(_floats(frame[target], target, where).astype(np.float32))
    else:
        columns["label"] = _encode_labels(frame[target], target, known, rows, where)
    return columns


def _encode_numbers(frame: Frame, known: TableEncoding, where: str) -> Tensor:
    encoded = np.empty((frame.num_rows, len(known.numbers)), np.float32)
    for column_idx, name in enumerate(known.numbers):
        values = _floats(require_column(frame, name, where, ""), name, where)
        scaled = (values - known.means[column_idx]) / known.deviations[column_idx]
        encoded[:, column_idx] = np.where(np.isnan(values), 0.0, scaled)
    return torch.from_numpy(encoded)


def _encode_categories(frame: Frame, known: TableEncoding, where: str) -> Tensor:
    encoded = np.empty((frame.num_rows, len(known.categories)), np.int64)
    for column_idx, name in enumerate(known.categories):
        texts = _texts(require_column(frame, name, where, ""))
        encoded[:, column_idx] = number_words(texts, known.vocabularies[column_idx]) + 1
    return torch.from_numpy(encoded)


def number_words(texts: Any, vocabulary: Sequence[str]) -> Indices:
    """Position of each text in the vocabulary, (N,) int64; -1 where it is missing or not in it."""
    known = pa.array(list(vocabulary), pa.string())
    found = pc.fill_null(pc.index_in(texts, value_set=known), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _encode_labels(column: Any, target: str, known: TableEncoding, rows: Indices, where: str) -> Tensor:
    texts = _texts(column)
    labels = number_words(texts, known.classes)
    unknown = np.flatnonzero(labels < 0)
    if unknown.size:
        word = texts[int(unknown[0])].as_py()
        raise DataError(
            "a class is not among those of the training data",
            where=f"{where}: column {target!r}, row {rows[unknown[0]]} (counted from 0)",
            got=f"{word!r}, and {unknown.size - 1:,} more such rows",
            expected=f"one of {', '.join(known.classes[:20])}",
            fix=nearest(word, list(known.classes)),
        )
    return torch.from_numpy(labels)


def _schema_of(encoding: TableEncoding) -> Schema:
    fields: dict[str, Field] = {}
    if encoding.numbers:
        fields["numbers"] = Field("number", (len(encoding.numbers),))
    if encoding.categories:
        fields["categories"] = Field("tensor", (len(encoding.categories),))
    if encoding.task == "classification":
        fields["label"] = Field("label", (), encoding.classes, is_target=True)
    else:
        fields["target"] = Field("number", (), is_target=True)
    return Schema(fields)
