"""Tables as pyarrow reads them: CSV, TSV, Parquet, Arrow and JSON lines, with typed columns and missing cells."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

from ..errors import DataError, nearest
from .index import near_name

Frame = Any
"""A pyarrow.Table; pyarrow has no types."""
Source = str | Path | Frame

MISSING = ("", "?", "NA", "NaN", "nan")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
JSON_LINES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", *PARQUET, *ARROW, *JSON_LINES)

_BLOCK_BYTES = 1 << 25  # a row must fit into one block: cells of 100,000 characters do
_SHARE_OF_NUMBERS = 0.9
_MANY_WORDS = 50
_RUN = 5  # so many numbers and then so many texts are a change of type, not a coincidence


@dataclass(frozen=True)
class Form:
    """How a table's file is written, where its ending and its first line do not tell."""

    is_csv: bool = False
    columns: tuple[str, ...] = ()
    text: tuple[str, ...] = ()  # columns of free text, whose cells are kept to the letter
    words: tuple[str, ...] = ()  # columns that are texts whatever this file's cells look like: "007" stays so


def is_table(path: Path, form: Form = Form()) -> bool:
    return form.is_csv or path.suffix.lower() in TABLE_SUFFIXES


def column_names(path: Path, form: Form = Form()) -> list[str]:
    """The columns of a table, without reading its rows where its form allows that.

    Raises:  DataError if the file cannot be read as such
    """
    suffix = path.suffix.lower()
    if form.columns:
        return list(form.columns)
    if suffix in PARQUET and not form.is_csv:
        with _readable(path):
            return list(pq.read_schema(path).names)
    if suffix in (*ARROW, *JSON_LINES) and not form.is_csv:
        return list(_read(path, form).column_names)
    return _csv_header(path)


def read_frame(source: Source, form: Form = Form()) -> Frame:
    """A table's file as a pyarrow.Table; one that is given as such is returned.

    A CSV's cells lose the blanks around them; "", "?", "NA", "NaN" and "nan" are missing; a column is of whole numbers,
    floats, bools, dates (ISO 8601) or texts, whichever holds all of its cells.
    Raises:  DataError if the file is missing, empty or not of this form
    """
    frame = _read(Path(source), form) if isinstance(source, str | Path) else source
    if not isinstance(frame, pa.Table):
        raise DataError(
            "this is no table", where="source", got=type(frame).__name__, expected="a path or a pyarrow.Table"
        )
    _check_names(frame.column_names, where_of(source))
    if not frame.num_rows:
        raise DataError("this table is empty", where=where_of(source), got="0 rows", expected="a row for each sample")
    return frame


def where_of(source: Source) -> str:
    """What messages call a source."""
    return str(source) if isinstance(source, str | Path) else "a table in memory"


def _read(path: Path, form: Form) -> Frame:
    suffix = path.suffix.lower()
    if form.is_csv or suffix not in (*PARQUET, *ARROW, *JSON_LINES):
        return _read_csv(path, form)
    with _readable(path):
        if suffix in ARROW:
            return _read_arrow(path)
        with path.open("rb") as file:  # by itself pyarrow would read "key=value" in the folder's name as a column
            if suffix in JSON_LINES:
                return pjson.read_json(file, pjson.ReadOptions(block_size=_BLOCK_BYTES))
            return pq.read_table(file)


def _read_arrow(path: Path) -> Frame:
    with pa.memory_map(str(path)) as file:  # mapped, not read: pages come in when a sample needs them
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the readers say of a file into the one form of message."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    what = "this table is missing" if isinstance(error, FileNotFoundError) else "this table cannot be read"
    near = near_name(path) if isinstance(error, FileNotFoundError) else ""
    got = (str(error).splitlines() or [type(error).__name__])[0][:300]
    if "utf-8" in got.lower() or "utf8" in got.lower():
        near = "iconv -f latin1 -t utf-8, if that is what it is"
    return DataError(what, where=path, got=got, expected=f"one of {', '.join(TABLE_SUFFIXES)}, in UTF-8", fix=near)


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_header(path: Path) -> list[str]:
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=_delimiter(path)), [])
    names = [name.strip() for name in header]
    _check_names(names, path)
    return names


def _check_names(names: Sequence[str], where: object) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise DataError(
            "this table's header cannot be used",
            where=where,
            got=f"{twice[0]!r} more than once" if twice else "no first line",
            expected="a name for each column, each once",
            fix='columns = ["text", "label"] names them where the file has no header',
        )


def _read_csv(path: Path, form: Form) -> Frame:
    names = list(form.columns) or _csv_header(path)
    _check_names(names, path)
    # every cell as text first: a blank before a number or a "?" among numbers must not decide its column's type
    convert = pcsv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False)
    parse = pcsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
    skipped = 0 if form.columns else 1
    # "after names" counts rows, where "skip_rows" counts lines: a name in quotes may have several
    read = pcsv.ReadOptions(column_names=names, skip_rows_after_names=skipped, block_size=_BLOCK_BYTES)
    with _readable(path):
        frame = pcsv.read_csv(path, read, parse, convert)
    if frame.num_rows:
        _check_closed(path, frame[names[-1]][-1].as_py(), frame.num_rows)
    return with_types(frame, form)


def with_types(frame: Frame, form: Form) -> Frame:
    """The same table, its texts as what all cells of their column can be read as: numbers, dates, bools, texts."""
    kept = {name for name in frame.column_names if name in form.text or not is_text(frame[name].type)}
    columns = {name: frame[name] for name in frame.column_names}
    return pa.table({n: held if n in kept else _typed(held, n in form.words) for n, held in columns.items()})


def _check_closed(path: Path, last: str, num_rows: int) -> None:
    # pyarrow takes a quote that nobody closes to the file's end, with all rows on the way, for one cell
    tail = last.replace('"', '""').encode()
    with path.open("rb") as file:
        file.seek(-min(len(tail), path.stat().st_size), os.SEEK_END)
        if "\n" not in last.strip() or file.read() != tail:
            return
    raise DataError(
        "a quote in this table is not closed",
        where=f"{path}, row {num_rows - 1} (counted from 0)",
        got=f"a last cell of {last.count(chr(10)):,} lines that begins with {last[:40]!r}",
        expected='cells such as "a, b", or a quote within one doubled',
    )


def _typed(texts: Any, are_words: bool) -> Any:
    trimmed = pc.utf8_trim_whitespace(pc.cast(texts, pa.string()))
    cells = pc.if_else(pc.is_in(trimmed, pa.array(MISSING)), pa.scalar(None, pa.string()), trimmed)
    if are_words:
        return cells
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us")):
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
            f"this table has no column {name!r}", where=where, got=f"columns {', '.join(frame.column_names[:30])}",
            expected=f"a column {name!r}",
            fix=nearest(name, frame.column_names) or (f"name it with {setting} = …" if setting else ""),
        )  # fmt: skip
    return frame[name]


def is_number(kind: Any) -> bool:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numeric or pa.types.is_null(kind))


def is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_category(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return is_category(kind.value_type)
    return is_text(kind) or bool(pa.types.is_boolean(kind))


def is_date(kind: Any) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def as_texts(column: Any) -> Any:
    """Categories and classes as texts, one array: 3 → "3", 3.0 → "3", True → "true"."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    texts = pc.cast(column, pa.string())
    if pa.types.is_floating(column.type):  # cell by cell: what else a column holds must not change a word
        column = pc.cast(column, pa.float64())
        is_whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
        whole = pc.cast(pc.cast(pc.if_else(is_whole, column, None), pa.int64()), pa.string())
        texts = pc.if_else(pc.is_nan(column), None, pc.coalesce(whole, texts))
    return texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts


def as_floats(column: Any, name: str, where: str) -> np.ndarray[Any, Any]:
    """(N,) float64, NaN where missing.

    Raises:  DataError for cells that are no numbers, or infinite
    """
    try:
        values = np.asarray(pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy())
    except pa.ArrowException as error:
        raise DataError(
            "a column of numbers holds something else", where=f"{where}: column {name!r}",
            got=str(error).splitlines()[0][:200], expected="numbers, as in the training table",
        ) from None  # fmt: skip
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0])
        raise DataError(
            "a number is infinite", where=f"{where}: column {name!r}, sample {row}", got=values[row],
            expected="a finite number, or an empty cell where it is missing",
        )  # fmt: skip
    return values


def number_words(texts: Any, vocabulary: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Position of each text in the vocabulary, (N,) int64; -1 where it is missing or not in it."""
    known = pa.array(list(vocabulary), pa.string())
    found = pc.fill_null(pc.index_in(texts, value_set=known), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def distinct(texts: Any) -> list[str]:
    """The different texts, sorted, without the missing one."""
    return sorted(word for word in pc.unique(texts).to_pylist() if word is not None)


def check_one_kind(column: Any, name: str, where: str) -> None:
    """A column of texts that are numbers but for a few, or up to some row, is a slip, not a category.

    Raises:  DataError naming the first cell that is no number
    """
    if not is_text(column.type):
        return
    is_numeric = pc.fill_null(pc.match_substring_regex(column, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"), True)
    others = len(column) - pc.sum(is_numeric).as_py()
    row = pc.index(is_numeric, False).as_py()
    few = others < (1 - _SHARE_OF_NUMBERS) * len(column) and pc.count_distinct(column).as_py() > _MANY_WORDS
    rest = pc.and_(is_numeric[row:], pc.is_valid(column[row:]))
    halfway = row >= _RUN and others >= _RUN and not pc.any(rest).as_py()
    if not others or not (few or halfway):
        return
    raise DataError(
        "a column changes its type",
        where=f"{where}: column {name!r}, row {row} (counted from 0)",
        got=f"{str(column[row].as_py())[:60]!r} among numbers; {others:,} of {len(column):,} cells are such texts",
        expected="numbers, or texts, throughout",
        fix=f'mend these cells, or categories = ["{name}"] if texts are meant, or drop = ["{name}"]',
    )


def check_ids(column: Any, name: str, where: str) -> None:
    """Raises:  DataError where an id is missing or names two samples"""
    counts = pc.value_counts(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    twice = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
    if twice >= 0 or column.null_count:
        got = repr(counts[twice]["values"].as_py()) + " more than once" if twice >= 0 else "an empty cell"
        raise DataError(
            "an id does not name one sample", where=f"{where}: column {name!r}", got=got,
            expected="a different id in each row",
        )  # fmt: skip
