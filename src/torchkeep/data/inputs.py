"""What a trained model is asked about, as batches: files, tables, columns, tensors, by the datasets of training."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..chance import ChanceKey
from ..contracts import Batch, KeyedDataset, Schema
from ..errors import BadSampleError, DataError
from ..settings import check
from .blobs import ListedFiles
from .dataset import whole
from .frames import (
    ARROW,
    JSON_LINES,
    PARQUET,
    TABLE_SUFFIXES,
    Form,
    Source,
    column_names,
    is_table,
    read_frame,
    with_types,
)
from .index import Listing, Names
from .kinds import ENCODED, kind_of, table_of
from .labels import LabelledData
from .sources import DataSettings
from .tables import Table, encode_inputs
from .text import TextFiles, Texts

_AS_IN_TRAINING = "a dataset as in training, in Python: run.predict(dataset)"
_AHEAD = 2  # batches read while the model computes


@dataclass(frozen=True)
class InputBatch:
    """Some inputs in order: their names, the batch of those that can be read, and what is wrong with the others."""

    names: list[str]
    batch: Batch | None
    problems: dict[int, str]


_Each = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]  # map, or a pool's
Read = Callable[[_Each], InputBatch]
"""A batch that nobody has read yet."""


class NamedFiles(ListedFiles):
    """Files by their paths; nobody has looked at their sizes."""

    sizes_bytes = None

    def __init__(self, paths: Sequence[Path]):
        none = np.empty(0, np.int64)
        super().__init__(Listing(Path(), Names.of(map(str, paths)), none, none, (), Names.of([]), none))


def held_by(dataset: KeyedDataset) -> Any:
    """The dataset that reads the samples of this one, which may be a part of it, or a stream."""
    held = whole(dataset)
    return getattr(held, "reader", held)


class FoundPaths(list[Path]):
    """Paths that were looked for, folders in place of which stand their files; ``are_files`` where none is a table."""

    are_files = False


def found_paths(paths: Iterable[Path], like: KeyedDataset, settings: DataSettings | None) -> FoundPaths:
    """All that the paths name, in order.

    Raises:  DataError for a path that is not there, or a folder in which there is nothing that the model takes
    """
    held, form = held_by(like), _said_form(settings)
    found = FoundPaths(_expanded(paths, held))
    found.are_files = not any(_holds_rows(path, held, form) for path in found)
    return found


def path_batches(
    paths: Sequence[Path], like: KeyedDataset, settings: DataSettings | None, batch_size: int
) -> Iterator[Read]:
    """Batches of what the paths name, in order: files, folders of files, tables.

    Raises:  DataError for a path that is not there, or of a kind that the training data are not
    """
    held, form = held_by(like), _said_form(settings)
    waiting: list[Path] = []
    # all of them are looked for before the first is read
    for path in paths if isinstance(paths, FoundPaths) else list(_expanded(paths, held)):
        if _holds_rows(path, held, form):
            yield from _file_batches(waiting, held, batch_size)
            waiting = []
            yield from _table_batches(path, held, _form_of(path, form), batch_size)
        else:
            waiting.append(path)
    yield from _file_batches(waiting, held, batch_size)


def _said_form(settings: DataSettings | None) -> Form:
    return (settings or check(DataSettings, {"train": ""}, "predict")).form


def read_ahead(batches: Iterator[Read], workers: int) -> Iterator[InputBatch]:
    """The batches, in order. With ``workers`` the next ones are read meanwhile, by so many threads where that does not
    hold the GIL."""
    if not workers:
        yield from (read(map) for read in batches)
        return
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as reader:

        def following() -> InputBatch | None:
            read = next(batches, None)
            return read(pool.map) if read is not None else None

        waiting = deque(reader.submit(following) for _ in range(_AHEAD))
        while (part := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(following))
            yield part


def _holds_rows(path: Path, held: Any, form: Form) -> bool:
    """Whether a path is a table: an image stays one where the recipe's table is a .csv under another ending."""
    is_sample = path.suffix.lower() in getattr(held, "suffixes", ()) and not isinstance(held, Table)
    if is_sample and not (form.is_csv and isinstance(held, Texts)):  # a .txt may be either: it was said to be a table
        return False
    return is_table(path, form)


def _expanded(paths: Iterable[Path], held: Any) -> Iterator[Path]:
    suffixes = getattr(held, "suffixes", ())
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_wanted(file.relative_to(path), suffixes))
            found = [file for file in found if not file.is_dir()]  # a link to nowhere gets a row that says so
            if not found:
                raise DataError(
                    "there is nothing in this folder that the model takes",
                    where=path,
                    expected=f"files that end in {', '.join(suffixes)}" if suffixes else _AS_IN_TRAINING,
                )
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError("there is no such input", where=path, got="no such file or folder")


def _is_wanted(name: Path, suffixes: tuple[str, ...]) -> bool:
    return name.suffix.lower() in suffixes and not any(part.startswith(".") for part in name.parts)


def _file_batches(paths: list[Path], held: Any, batch_size: int) -> Iterator[Read]:
    if not paths:
        return
    if not isinstance(held, LabelledData):
        raise DataError(
            "this model does not take files", where=paths[0], got=f"a file that ends in {paths[0].suffix!r}",
            expected=f"a table: {', '.join(TABLE_SUFFIXES)}" if isinstance(held, Table) else _AS_IN_TRAINING,
        )  # fmt: skip
    made: Any = ENCODED[kind_of(held)]
    files = NamedFiles(paths)
    source = TextFiles(files, "inputs") if made is Texts else files
    yield from _read(made(source, None, "inputs", like=held), batch_size)


def _table_batches(source: Source, held: Any, form: Form, batch_size: int) -> Iterator[Read]:
    # bytes that are no UTF-8 as escapes, as in the names of files
    where = os.fsencode(source).decode("utf-8", "backslashreplace") if isinstance(source, str | Path) else ""
    if isinstance(held, Table):
        yield from _encoded(source, held, form, batch_size, where)
        return
    named = column_names(Path(source), form) if isinstance(source, str | Path) else source.column_names
    column = getattr(held, "input_column", "")
    if column not in named:
        raise DataError(
            "this model does not take this table", where=where, got=f"columns {', '.join(named[:20])}",
            expected=f"a column {column!r}, as in training" if column else _AS_IN_TRAINING,
        )  # fmt: skip
    yield from _read(table_of(kind_of(held), source, column, None, form=form, like=held), batch_size, where)


def _form_of(path: Path, form: Form) -> Form:
    """format = "csv" and the columns' names are of tables whose ending and first line do not say it."""
    return Form(text=form.text) if path.suffix.lower() in (*PARQUET, *ARROW, *JSON_LINES) else form


def _encoded(source: Source, held: Table, form: Form, batch_size: int, where: str) -> Iterator[Read]:
    form = replace(form, words=held.encoding.words)
    frame = read_frame(source, form)
    if not where:  # a caller's columns: a date may be a text, as in a CSV
        frame = with_types(frame, form)
    columns = encode_inputs(frame, held.encoding, where or "columns")
    yield from _slices(columns, batch_size, f"{where}, row " if where else "row ")


def _slices(columns: Mapping[str, Any], batch_size: int, what: str) -> Iterator[Read]:
    total = len(next(iter(columns.values())))
    for start in range(0, total, batch_size):
        yield partial(_sliced, columns, range(start, min(start + batch_size, total)), what)


def _sliced(columns: Mapping[str, Any], rows: range, what: str, each: _Each) -> InputBatch:
    batch: Batch = {name: values[rows.start : rows.stop] for name, values in columns.items()}
    return InputBatch([f"{what}{row}" for row in rows], _indexed(batch, len(rows)), {})


def column_batches(columns: Mapping[str, Any], like: KeyedDataset, batch_size: int) -> Iterator[Read]:
    """Batches of a table's columns that a program holds: lists or arrays by name, (N,) each.

    Raises:  DataError for columns that make no table, or not one that the training data are like
    """
    try:
        frame = pa.table(dict(columns))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            "these columns make no table", where=", ".join(map(str, columns))[:200], got=str(error)[:200],
            expected="lists or arrays of one length, each of one type",
        ) from None  # fmt: skip
    yield from _table_batches(frame, held_by(like), Form(), batch_size)


def given_lines(data: bytes, like: KeyedDataset, settings: DataSettings) -> list[Path] | list[str] | dict[str, Any]:
    """What stands on standard input: texts, one a line, for a model of texts; a CSV for a model of a table; else names
    of files, one a line, or with zero bytes between them.

    Raises:  DataError for nothing, for a table that cannot be read, and for texts that are no UTF-8
    """
    held = held_by(like)
    if not data.strip():
        raise DataError("there is nothing to predict", where="standard input", got=f"{len(data)} bytes")
    if isinstance(held, Table):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "stdin.csv")
            path.write_bytes(data)
            frame = read_frame(path, replace(settings.form, words=held.encoding.words))
        return dict(zip(frame.column_names, frame.columns, strict=True))
    separator = b"\0" if b"\0" in data else b"\n"
    lines = data.removesuffix(separator).split(separator)
    if not isinstance(held, Texts):
        return [Path(os.fsdecode(name)) for line in lines if (name := line.removesuffix(b"\r"))]
    try:
        return data.decode("utf-8-sig").removesuffix("\n").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "these texts are not UTF-8", where=f"standard input, line {line:,}", got=f"byte {data[error.start]:#04x}",
            expected="UTF-8", fix="iconv -f latin1 -t utf-8, if that is what it is",
        ) from None  # fmt: skip


def tensor_batches(tensors: Mapping[str, Any], schema: Schema, batch_size: int) -> Iterator[Read]:
    """Batches of a model's inputs themselves: tensors or arrays by name, called by their numbers.

    Shapes:  (N, …) each
    Raises:  DataError where they are not as many, or have other axes than a batch of the training data
    """
    held = {name: _as_tensor(name, given) for name, given in tensors.items()}
    for name, tensor in held.items():
        shape = schema[name].shape if name in schema else None
        if not tensor.ndim or (shape is not None and tensor.ndim != 1 + len(shape)):
            raise DataError(
                "an input has other axes than in training", where=name, got=f"shape {tuple(tensor.shape)}",
                expected=f"(N, {', '.join(str(size or '…') for size in shape or ('…',))})",
            )  # fmt: skip
    if len({len(tensor) for tensor in held.values()}) != 1:
        got = ", ".join(f"{name}: {len(tensor):,}" for name, tensor in held.items()) or "none"
        raise DataError("these inputs are not as many", where="inputs", got=got, expected="one length")
    yield from _slices(held, batch_size, "")


def _as_tensor(name: str, given: Any) -> torch.Tensor:
    is_locked = isinstance(given, np.ndarray) and not given.flags.writeable  # torch would warn of it
    try:
        return torch.as_tensor(given.copy() if is_locked else given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "an input is no array of numbers", where=name, got=str(error)[:200], expected="a tensor or an array"
        ) from None


def _read(made: Any, batch_size: int, where: str = "") -> Iterator[Read]:
    plain = made.without_augmentation()
    for start in range(0, len(made), batch_size):
        yield partial(_samples_read, plain, range(start, min(start + batch_size, len(made))), where)


def _samples_read(plain: Any, rows: range, where: str, each: _Each) -> InputBatch:
    """A sample that cannot be read is a problem of its own; the others make the batch."""
    names = [f"{where}, {name}" if where and name.startswith("row ") else name for name in map(plain.id_of, rows)]
    found = list((each if plain.threads else map)(partial(_sample_read, plain), rows))
    problems = {position: one for position, one in enumerate(found) if isinstance(one, str)}
    samples = [one for one in found if not isinstance(one, str)]
    return InputBatch(names, _indexed(plain.collate(samples), len(samples)) if samples else None, problems)


def _sample_read(plain: Any, index: int) -> Any:
    """A sample, or what is wrong with it."""
    try:
        return plain.read(index, ChanceKey())
    except BadSampleError as error:
        return f"{error.what}: {error.got}"


def _indexed(batch: Batch, size: int) -> Batch:
    return batch | {"index": torch.arange(size)}
