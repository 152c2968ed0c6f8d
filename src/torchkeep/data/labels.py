"""What is to be predicted, a value for each sample: a class, several classes, or a number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from torch import Tensor

from ..chance import ChanceKey
from ..contracts import Batch, Field, Preprocess, Sample, Schema
from ..errors import DataError, nearest
from .dataset import Indices, KeyedData
from .frames import (
    Frame,
    as_floats,
    as_texts,
    distinct,
    is_category,
    is_number,
    is_text,
    number_words,
    require_column,
)
from .index import bytes_of_array


@dataclass(frozen=True)
class Labels:
    """Classes (one or several for each sample) or numbers, held as arrays.

    Shapes:  values (N,) integers for one class each; float32 for numbers; for several classes each, those of sample i
             are values[offsets[i]:offsets[i + 1]], and a sample's label is float32 (K,) of zeros and ones
    """

    key: str
    field: Field
    values: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def of(self, index: int) -> Any:
        """The value of one sample, as a sample holds it."""
        if self.field.kind == "label":
            return int(self.values[index])
        return float(self.values[index]) if self.offsets is None else self.batch(np.array([index]))[0]

    def batch(self, indices: Indices) -> Tensor:
        """Shapes:  indices (B,) → int64 (B,), float32 (B,) or float32 (B, K)"""
        if self.offsets is None:
            kind = np.int64 if self.field.kind == "label" else np.float32
            return torch.from_numpy(self.values[indices].astype(kind))
        held = torch.zeros(len(indices), self.field.num_classes)
        for row, index in enumerate(indices.tolist()):
            held[row, torch.from_numpy(self.values[self.offsets[index] : self.offsets[index + 1]])] = 1
        return held

    @property
    def classes(self) -> Indices | None:
        """(N,) int64 where each sample has one class, else None."""
        return self.values.astype(np.int64) if self.field.kind == "label" else None

    def learned_from(self, indices: Indices) -> Labels:
        """The same labels; the mean and deviation of numbers are those of these samples alone."""
        if self.field.kind != "number":
            return self
        return replace(self, field=number_field(self.values[indices]))

    def absorb(self, digest: Any) -> None:
        """Add all of it to a checksum."""
        digest.update("\0".join(self.field.classes).encode("utf-8", "surrogateescape"))
        for numbers in (self.values, self.offsets):
            if numbers is not None:
                digest.update(bytes_of_array(numbers))


class LabelledData(KeyedData):
    """The base of images, recordings and texts: encoded samples, of which each may have a label."""

    suffixes: tuple[str, ...] = ()  # of files that hold one sample
    input_column: str  # where the input stands in a table
    _held: Any  # says how many there are, what each is called, and what all of them are
    _labels: Labels | None

    def __len__(self) -> int:
        return len(self._held)

    def id_of(self, index: int) -> str:
        return str(self._held.id_of(index))

    def _where(self, index: int, key: ChanceKey | None = None) -> str:
        epoch = f", epoch {key.epoch + 1}" if key is not None else ""
        return f"{self.where}: {self.id_of(index)} (sample {index}{epoch})"

    def _schema_of(self, fields: dict[str, Field], preprocess: Preprocess | None = None) -> Schema:
        label = {} if self._labels is None else {self._labels.key: self._labels.field}
        return Schema({**fields, **label, "id": Field("object")}, preprocess)

    def _label_of(self, index: int) -> Sample:
        return {} if self._labels is None else {self._labels.key: self._labels.of(index)}

    def labels_of(self, indices: Indices) -> Batch:
        return {} if self._labels is None else {self._labels.key: self._labels.batch(indices)}

    def learned_from(self, indices: Indices) -> Any:
        """The same samples; the mean and deviation of a target of numbers are those of these samples alone."""
        if self._labels is None:
            return self
        made = copy.copy(self)
        made._labels = self._labels.learned_from(indices)
        fields = {**self.schema.fields, made._labels.key: made._labels.field}
        made.schema = Schema(fields, self.schema.preprocess)
        return made

    def _digest(self, said: str, *more: Any) -> str:
        """xxh3 of the samples' names, sizes or bytes, of the labels, and of what is made of them."""
        digest = xxhash.xxh3_128(said.encode())
        for part in (self._held, *more, self._labels):
            if part is not None:
                part.absorb(digest)
        return str(digest.hexdigest())

    @property
    def labels(self) -> Indices | None:
        """Class of each sample, (N,) int64; None where there is not one for each."""
        return self._labels.classes if self._labels is not None else None


def labels_of_classes(values: np.ndarray[Any, Any], found: Sequence[str], like: Field | None, where: str) -> Labels:
    """Labels of class numbers, counted in ``found``; brought to the classes of ``like`` where it is given.

    Raises:  DataError for a class that ``like`` does not know
    """
    if like is None or like.classes == tuple(found):
        return Labels("label", Field("label", (), tuple(found), is_target=True), values)
    if like.kind != "label":
        raise DataError(
            "these labels are of another kind than those of the training data", where=where, got="kind 'label'",
            expected=f"kind {like.kind!r}",
        )  # fmt: skip
    check_classes(found, like.classes, where)
    place_of = {name: place for place, name in enumerate(like.classes)}
    place = np.array([place_of[name] for name in found], np.int64)
    return Labels("label", like, place[values])


def labels_of_column(
    frame: Frame, name: str, where: str, like: Field | None = None, separator: str | None = None
) -> Labels:
    """A column as what is to be predicted: texts, bools and whole numbers are classes, lists (or texts with a
    ``separator``) several classes, floats numbers; with ``like`` they are what they are there. Hugging Face's class
    names are read from its description.

    Raises:  DataError for a missing column, an empty cell, a type that holds no labels, a class that ``like`` lacks
    """
    column, place = require_column(frame, name, where, "data.label"), f"{where}: column {name!r}"
    if separator is not None and is_text(column.type):
        column = pc.fill_null(column, "")  # an empty cell: none of the classes
    check_filled(column, place)
    names = hub_names(frame, name)
    kind = like.kind if like is not None else _kind_of(column.type, separator)
    if kind == "multilabel":
        return _several(column, names, place, like, separator)
    if kind == "number":
        values = as_floats(column, name, where).astype(np.float32)
        return Labels("target", like or number_field(values), values)
    _check_words(column.type, place, "texts, whole numbers, lists", like)
    texts = _named(column, names, place)
    classes = like.classes if like is not None else classes_of(texts, column.type, names)
    return Labels("label", like or Field("label", (), classes, is_target=True), number_classes(texts, classes, place))


def _kind_of(kind: Any, separator: str | None) -> str:
    if _is_list(kind) or separator is not None:
        return "multilabel"
    return "number" if pa.types.is_floating(kind) else "label"


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _check_words(kind: Any, place: str, expected: str, like: Field | None) -> None:
    # 3.0 may stand for a class "3" of the training data, where it cannot be told from a number alone
    is_word = is_category(kind) or pa.types.is_integer(kind) or (like is not None and pa.types.is_floating(kind))
    if not is_word:
        raise DataError("this column holds no labels", where=place, got=f"type {kind}", expected=expected)


def number_field(values: np.ndarray[Any, Any]) -> Field:
    """The field of a number to be predicted, with its mean and deviation over these values."""
    mean, std = moments(values)
    return Field("number", (), is_target=True, mean=mean, std=std)


def moments(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean and deviation of what is finite; 0 and 1 where nothing is, and 1 for a constant, which then becomes 0."""
    known = values[np.isfinite(values)].astype(np.float64)
    return (float(known.mean()), float(known.std()) or 1.0) if known.size else (0.0, 1.0)


def number_classes(texts: Any, classes: Sequence[str], place: str, rows: Indices | None = None) -> Indices:
    """Which class each text is, (N,) int64; ``rows`` says which row of the file each is of.

    Raises:  DataError where one is not among those of the training data
    """
    numbers = number_words(texts, classes)
    unknown = np.flatnonzero(numbers < 0)
    if unknown.size:
        row = unknown[0] if rows is None else rows[unknown[0]]
        check_classes(distinct(texts.take(pa.array(unknown))), classes, f"{place}, row {row} (counted from 0)")
    return numbers


def check_classes(found: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Raises:  DataError where a class is not among those of the training data"""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            "a class is not among those of the training data",
            where=where,
            got=", ".join(repr(name) for name in unknown[:5])
            + (f" and {len(unknown) - 5:,} more" * (len(unknown) > 5)),
            expected=f"one of {', '.join(classes[:20])}" + (" …" if len(classes) > 20 else ""),
            fix=nearest(unknown[0], list(classes)),
        )


def check_filled(column: Any, place: str, what: str = "label", rows: Indices | None = None) -> None:
    """Raises:  DataError where a cell is empty; ``rows`` says which row of the file each is"""
    missing = pc.is_null(column, nan_is_null=True)
    row = pc.index(missing, True).as_py()
    if row >= 0:
        raise DataError(
            f"a {what} is missing", where=f"{place}, row {row if rows is None else rows[row]} (counted from 0)",
            got=f"{pc.sum(missing).as_py():,} of {len(column):,} cells are empty", expected=f"a {what} in each row",
            fix="remove these rows",
        )  # fmt: skip


def _named(column: Any, names: list[str], place: str) -> Any:
    """Class numbers as their names where those are known; one array of texts."""
    if not names or not pa.types.is_integer(column.type) or not len(column):
        return as_texts(column)
    lowest, highest = pc.min(column).as_py(), pc.max(column).as_py()
    if lowest < 0 or highest >= len(names):
        got = f"labels from {lowest} to {highest}"
        raise DataError("a label has no name", where=place, got=got, expected=f"0 to {len(names) - 1}")
    named = pc.take(pa.array(names), column)
    return named.combine_chunks() if isinstance(named, pa.ChunkedArray) else named


def classes_of(texts: Any, kind: Any, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes in a column of this type, in order; those of class numbers that have ``names`` are these."""
    if names and pa.types.is_integer(kind):
        return tuple(names)
    found = distinct(texts)
    # "10" comes after "9" among numbers
    return tuple(sorted(found, key=float) if is_number(kind) else found)


def _several(column: Any, names: list[str], place: str, like: Field | None, separator: str | None) -> Labels:
    column = _as_lists(column, place, separator, like is None)
    rows = np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy())
    held = pc.list_flatten(column)
    _check_words(held.type, place, "lists of texts or whole numbers", like)
    check_filled(held, f"{place}, lists")
    cells = pc.utf8_trim_whitespace(_named(held, names, place))
    is_named = pc.not_equal(cells, "")  # nothing stands between "a||b"
    cells, rows = pc.filter(cells, is_named), rows[is_named.to_numpy(zero_copy_only=False)]
    classes = like.classes if like is not None else tuple(names) or classes_of(cells, held.type)
    if not classes:
        raise DataError("there is no label in any of these rows", where=place, got="empty lists", expected="labels")
    numbers = number_classes(cells, classes, place, rows)
    offsets = np.zeros(len(column) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(column)), out=offsets[1:])
    field = Field("multilabel", (len(classes),), classes, is_target=True)
    return Labels("label", like or field, numbers, offsets)


def _as_lists(column: Any, place: str, separator: str | None, is_new: bool) -> Any:
    """Lists of labels: texts are parted at the separator; where all cells hold one number they were read as such."""
    if _is_list(column.type):
        return column
    if separator is None or not (is_category(column.type) or pa.types.is_integer(column.type)):
        raise DataError(
            "this column holds no lists of labels", where=place, got=f"type {column.type}",
            expected="lists, or texts with a separator",
            fix="" if separator else 'separator = "|" if that stands between them',
        )  # fmt: skip
    texts = as_texts(column)
    if is_new and is_text(column.type) and not pc.any(pc.match_substring(texts, separator)).as_py():
        raise DataError(
            "the separator is in no cell", where=place, got=repr(separator), expected='such as "|" in "a|b"'
        )
    return pc.split_pattern(texts, separator)


def hub_features(frame: Frame) -> dict[str, Any]:
    """What Hugging Face's datasets writes into a file of its columns; empty where there is nothing of it."""
    described = (frame.schema.metadata or {}).get(b"huggingface")
    try:
        return dict(orjson.loads(described)["info"]["features"]) if described else {}
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return {}


def hub_names(frame: Frame, label: str) -> list[str]:
    """The class names that Hugging Face's datasets writes into a file; empty where there are none."""
    kind = hub_features(frame).get(label)
    kind = kind.get("feature") or kind if isinstance(kind, dict) else None
    return list(map(str, kind.get("names") or [])) if isinstance(kind, dict) else []
