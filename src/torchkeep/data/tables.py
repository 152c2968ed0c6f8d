"""Tables of numbers and categories, converted once; a batch is one gather per tensor.

Statistics come from the training rows alone; validation and test take them over with ``like=``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch import Tensor

from ..contracts import Field, Json, Schema
from ..errors import DataError
from .arrays import Columns
from .dataset import Indices, whole_of
from .frames import (
    TABLE_SUFFIXES,
    Form,
    Frame,
    Source,
    as_floats,
    as_texts,
    check_ids,
    check_one_kind,
    distinct,
    is_category,
    is_date,
    is_number,
    is_text,
    number_words,
    read_frame,
    require_column,
    where_of,
)
from .labels import check_filled, classes_of, moments, number_classes

Task = Literal["auto", "classification", "regression"]

_MAX_INTEGER_CLASSES = 50
_DAY_US = 86_400_000_000
_CYCLES = {"year": 365.2425, "week": 7.0, "day": 1.0}  # in days
PARTS = ("value", "missing", "days", *(f"{cycle} {wave}" for cycle in _CYCLES for wave in ("sin", "cos")))
"""What a ``NumberFeature`` may be of its column."""


@dataclass(frozen=True)
class NumberFeature:
    """One number that a model gets: a column's value, whether it is missing, or a part of a date.

    ``part`` is "value", "missing", or of a date "days" since 1970, or "year sin" … "day cos".
    """

    column: str
    part: str = "value"
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def name(self) -> str:
        return self.column if self.part in ("value", "days") else f"{self.column}: {self.part}"

    def values(self, column: Any, where: str) -> np.ndarray[Any, Any]:
        """(N,) float64, standardised; 0 where missing."""
        if self.part == "missing":
            return _is_missing(column)
        raw = as_floats(column, self.column, where) if self.part == "value" else _date_part(column, self, where)
        scaled = (raw - self.mean) / self.deviation
        return np.where(np.isnan(scaled), 0.0, scaled)


@dataclass(frozen=True)
class TableEncoding:
    """What was learned from the training rows, JSON values only: it is all that new rows need."""

    target: str
    task: Literal["classification", "regression"]
    features: tuple[NumberFeature, ...]
    categories: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    target_mean: float = 0.0
    target_std: float = 1.0
    words: tuple[str, ...] = ()  # columns of texts: in another file they are texts too, whatever its cells look like

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers, in their order."""
        return tuple(feature.name for feature in self.features)

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
        features = tuple(NumberFeature(**row) for row in data["features"])
        vocabularies = tuple(tuple(words) for words in data["vocabularies"])
        return TableEncoding(**{**read, "features": features, "vocabularies": vocabularies})


class Table(Columns):
    """Rows of a table's file, or of a pyarrow.Table: numbers standardised, categories numbered, dates as numbers.

    A missing number becomes the mean, which is 0, and a number beside it says so where training rows lack some; a
    missing or unseen category becomes 0. A date is its days and the sine and cosine of its place in the year, the week
    and, where times are given, the day. Statistics and numbering are those of ``rows`` (all by default), or those of
    ``like``, a Table or its encoding. With task "auto" a target of texts, bools or at most 50 different whole numbers
    is a label, anything else is a number. ``categories`` are columns of numbers that only name something.

    Shapes:  "numbers" float32 (F,), "categories" int64 (G,), each where there are any; "label" int or "target" float32
    Raises:  DataError for a column that is missing or cannot be used, a row without a target, an unknown class
    """

    suffixes = TABLE_SUFFIXES

    def __init__(
        self, source: Source, target: str, *, task: Task = "auto", like: Table | TableEncoding | Any = None,
        rows: Sequence[int] | Indices | None = None, drop: Sequence[str] = (), categories: Sequence[str] = (),
        id: str | None = None, form: Form | None = None,
    ):  # fmt: skip
        self.where = where_of(source)
        self._unused = {*drop, *([id] if id else [])}
        self._forced, self._id = set(categories), id
        trained = None if isinstance(like, TableEncoding) else whole_of(like, Table, "a table", self.where)
        known: Any = trained.encoding if trained is not None else like
        self._frame = frame = read_frame(source, replace(form or Form(), words=known.words if known else ()))
        self.rows = np.arange(frame.num_rows) if rows is None else np.asarray(rows, dtype=np.int64)
        for setting, names in (("drop", drop), ("categories", categories)) if known is None else ():
            for name in names:
                require_column(frame, name, self.where, setting)
        if id is not None:
            check_ids(require_column(frame, id, self.where, "id"), id, self.where)
        require_column(frame, target, self.where, "target")
        chosen = frame if rows is None else frame.take(pa.array(self.rows))
        check_filled(chosen[target], f"{self.where}: column {target!r}", "target", self.rows)
        self._target = target
        self._encode(chosen, known or _learn(chosen, target, task, self._unused, self._forced, self.where))

    @classmethod
    def without_rows(cls, encoding: TableEncoding, where: str) -> Table:
        """A table that only says how others are encoded: for ``like``, where the training rows are not at hand."""
        made = cls.__new__(cls)
        names = {*(feature.column for feature in encoding.features), *encoding.categories, encoding.target}
        made._frame = pa.table({name: pa.nulls(0) for name in sorted(names)})
        made.where, made.rows, made._id, made._target = where, np.empty(0, np.int64), None, encoding.target
        made._unused, made._forced = set(), set()
        made._encode(made._frame, encoding)
        return made

    def _encode(self, chosen: Frame, known: TableEncoding) -> None:
        self.encoding, self.schema = known, _schema_of(known)
        self.columns = encode_inputs(chosen, known, self.where)
        target = chosen[self._target]
        if known.task == "regression":
            numbers = as_floats(target, self._target, self.where).astype(np.float32)
            self.columns["target"] = torch.from_numpy(numbers)
        else:
            place = f"{self.where}: column {self._target!r}"
            labels = number_classes(as_texts(target), known.classes, place, self.rows)
            self.columns["label"] = torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """xxh3 of the encoded columns and of what encodes them."""
        return xxhash.xxh3_128_hexdigest(f"{self.encoding!r}|{super().fingerprint()}".encode())

    def id_of(self, index: int) -> str:
        """The row's id, or its place in the file, counted from 0."""
        return str(self._frame[self._id][int(self.rows[index])]) if self._id else f"row {self.rows[index]}"

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """The stored values of any column of the source, (N,): what splits by group or time go by."""
        stored = require_column(self._frame, name, self.where, "data.split_by")
        return np.asarray(stored.take(pa.array(self.rows)).to_numpy())

    def learned_from(self, indices: Indices) -> Table:
        """The same rows; statistics, numbering and classes are those of these samples alone."""
        chosen = self._frame.take(pa.array(self.rows[indices]))
        learned = _learn(chosen, self._target, self.encoding.task, self._unused, self._forced, self.where)
        made = copy.copy(self)
        made._encode(self._frame.take(pa.array(self.rows)), learned)
        return made

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """For each of the G categories how many numbers are in use, 0 for missing or unseen included."""
        return self.encoding.cardinalities


def _learn(frame: Frame, target: str, task: Task, unused: set[str], forced: set[str], where: str) -> TableEncoding:
    """Statistics, vocabularies and classes of these rows."""
    columns = [name for name in frame.column_names if name != target and name not in unused]
    for name in columns:
        kind = frame[name].type
        if not (is_number(kind) or is_category(kind) or is_date(kind)):
            raise DataError(
                "a column cannot be used", where=f"{where}: column {name!r}", got=f"type {kind}",
                expected="numbers, texts, bools or dates", fix=f'drop = ["{name}"]',
            )  # fmt: skip
        if name not in forced:
            check_one_kind(frame[name], name, where)
    if task == "auto":
        check_one_kind(frame[target], target, where)
    categories = [name for name in columns if name in forced or is_category(frame[name].type)]
    if not columns:
        raise DataError("this table has no column beside its target", where=where, got=f"columns {frame.column_names}")
    features = [f for name in columns if name not in categories for f in _features_of(frame[name], name, where)]
    found = _task_of(frame[target], task, f"{where}: column {target!r}")
    mean, std = moments(as_floats(frame[target], target, where)) if found == "regression" else (0.0, 1.0)
    return TableEncoding(
        target=target,
        task=found,
        features=tuple(features),
        categories=tuple(categories),
        vocabularies=tuple(tuple(distinct(as_texts(frame[name]))) for name in categories),
        classes=classes_of(as_texts(frame[target]), frame[target].type) if found == "classification" else (),
        target_mean=mean,
        target_std=std,
        words=tuple(name for name in (*categories, target) if is_text(frame[name].type)),
    )


def _features_of(column: Any, name: str, where: str) -> list[NumberFeature]:
    if is_date(column.type):
        days = _date_part(column, NumberFeature(name, "days"), where)
        found = [NumberFeature(name, "days", *moments(days))]
        cycles = [cycle for cycle in _CYCLES if cycle != "day" or _has_times(column)]
        found += [NumberFeature(name, f"{cycle} {wave}") for cycle in cycles for wave in ("sin", "cos")]
    else:
        found = [NumberFeature(name, "value", *moments(as_floats(column, name, where)))]
    missing = _is_missing(column)
    return [*found, NumberFeature(name, "missing")] if missing.any() and not missing.all() else found


def _is_missing(column: Any) -> np.ndarray[Any, Any]:
    return np.asarray(pc.is_null(column, nan_is_null=True).to_numpy(), np.float64)


def _microseconds(column: Any) -> np.ndarray[Any, Any]:
    """(N,) float64 since 1970, NaN where missing."""
    times = pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64())
    return np.asarray(pc.cast(times, pa.float64(), safe=False).to_numpy(), np.float64)


def _date_part(column: Any, feature: NumberFeature, where: str) -> np.ndarray[Any, Any]:
    if column.null_count == len(column):  # a file whose cells are all empty does not say what they are
        return np.full(len(column), np.nan)
    if not is_date(column.type):
        raise DataError(
            "a column of dates holds something else",
            where=f"{where}: column {feature.column!r}",
            got=f"type {column.type}",
            expected="dates such as 2026-11-24 or 2026-11-24 18:30:00, as in the training table",
        )
    days = _microseconds(column) / _DAY_US
    if feature.part == "days":
        return days
    cycle, _, wave = feature.part.partition(" ")
    angle = 2 * np.pi * days / _CYCLES[cycle]
    return np.sin(angle) if wave == "sin" else np.cos(angle)


def _has_times(column: Any) -> bool:
    if pa.types.is_date(column.type):
        return False
    times = _microseconds(column)
    return bool((times[np.isfinite(times)] % _DAY_US != 0).any())


def _task_of(column: Any, task: Task, where: str) -> Literal["classification", "regression"]:
    if not is_number(column.type) and not is_category(column.type):
        raise DataError(
            "this target cannot be used", where=where, got=f"type {column.type}", expected="texts or numbers"
        )
    if task == "regression" and not is_number(column.type):
        raise DataError("this target is no number", where=where, got=f"type {column.type}", expected="numbers")
    if task != "auto":
        return task
    if is_category(column.type):
        return "classification"
    return "classification" if are_class_numbers(column) else "regression"


def are_class_numbers(column: Any) -> bool:
    """Whether these are whole numbers, and so few different ones that they are taken for classes."""
    return bool(pa.types.is_integer(column.type) and pc.count_distinct(column).as_py() <= _MAX_INTEGER_CLASSES)


def encode_inputs(frame: Frame, known: TableEncoding, where: str) -> dict[str, Tensor]:
    """The columns that a model takes, as they were encoded for its training; rows need no target.

    Shapes:  "numbers" float32 (N, F), "categories" int64 (N, G), each where there are any
    Raises:  DataError for a missing column or one of another type
    """
    columns: dict[str, Tensor] = {}
    if known.features:
        numbers = np.empty((frame.num_rows, len(known.features)), np.float32)
        for place, feature in enumerate(known.features):
            numbers[:, place] = feature.values(require_column(frame, feature.column, where, ""), where)
        columns["numbers"] = torch.from_numpy(numbers)
    if known.categories:
        encoded = np.empty((frame.num_rows, len(known.categories)), np.int64)
        for place, name in enumerate(known.categories):
            texts = as_texts(require_column(frame, name, where, ""))
            encoded[:, place] = number_words(texts, known.vocabularies[place]) + 1
        columns["categories"] = torch.from_numpy(encoded)
    return columns


def _schema_of(encoding: TableEncoding) -> Schema:
    fields: dict[str, Field] = {}
    if encoding.features:
        fields["numbers"] = Field("number", (len(encoding.features),))
    if encoding.categories:
        fields["categories"] = Field("tensor", (len(encoding.categories),))
    if encoding.task == "classification":
        fields["label"] = Field("label", (), encoding.classes, is_target=True)
    else:
        fields["target"] = Field("number", (), is_target=True, mean=encoding.target_mean, std=encoding.target_std)
    return Schema(fields)
