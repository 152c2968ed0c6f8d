"""Files and tables that a trained model is asked about: the datasets of training, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..chance import ChanceKey
from ..contracts import Batch, KeyedDataset
from ..errors import BadSampleError, DataError
from ..settings import check
from .blobs import ListedFiles
from .dataset import whole
from .frames import ARROW, JSON_LINES, PARQUET, TABLE_SUFFIXES, Form, column_names, is_table, read_frame
from .index import Listing, Names
from .kinds import ENCODED, kind_of, table_of
from .labels import LabelledData
from .sources import DataSettings
from .tables import Table, encode_inputs
from .text import TextFiles, Texts

_AS_IN_TRAINING = "a dataset as in training, in Python: run.predict(dataset)"


@dataclass(frozen=True)
class InputBatch:
    """Some inputs in order: their names, the batch of those that can be read, and what is wrong with the others."""

    names: list[str]
    batch: Batch | None
    problems: dict[int, str]


class NamedFiles(ListedFiles):
    """Files by their paths; nobody has looked at their sizes."""

    sizes_bytes = None

    def __init__(self, paths: Sequence[Path]):
        none = np.empty(0, np.int64)
        super().__init__(Listing(Path(), Names.of(map(str, paths)), none, none, (), Names.of([]), none))


def input_batches(
    paths: Sequence[Path], like: KeyedDataset, settings: DataSettings | None, batch_size: int
) -> Iterator[InputBatch]:
    """Batches of what the paths name, in order: files, folders of files, tables.

    Raises:  DataError for a path that is not there, or of a kind that the training data are not
    """
    held = whole(like)
    held = getattr(held, "reader", held)
    settings = settings or check(DataSettings, {"train": ""}, "predict")
    form = settings.form
    waiting: list[Path] = []
    for path in list(_expanded(paths, held)):  # all of them are looked for before the first is read
        if _holds_rows(path, held, form):
            yield from _file_batches(waiting, held, batch_size)
            waiting = []
            yield from _table_batches(path, held, settings, batch_size)
        else:
            waiting.append(path)
    yield from _file_batches(waiting, held, batch_size)


def _holds_rows(path: Path, held: Any, form: Form) -> bool:
    """Whether a path is a table: an image stays one where the recipe's table is a .csv under another ending."""
    is_sample = path.suffix.lower() in getattr(held, "suffixes", ()) and not isinstance(held, Table)
    if is_sample and not (form.is_csv and isinstance(held, Texts)):  # a .txt may be either: it was said to be a table
        return False
    return is_table(path, form)


def _expanded(paths: Sequence[Path], held: Any) -> Iterator[Path]:
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


def _file_batches(paths: list[Path], held: Any, batch_size: int) -> Iterator[InputBatch]:
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


def _table_batches(path: Path, held: Any, settings: DataSettings, batch_size: int) -> Iterator[InputBatch]:
    form = _form_of(path, settings.form)
    if isinstance(held, Table):
        yield from _encoded(path, held, form, batch_size)
        return
    named, column = column_names(path, form), getattr(held, "input_column", "")
    if column not in named:
        raise DataError(
            "this model does not take this table", where=path, got=f"columns {', '.join(named[:20])}",
            expected=f"a column {column!r}, as in training" if column else _AS_IN_TRAINING,
        )  # fmt: skip
    yield from _read(table_of(kind_of(held), path, column, None, form=form, like=held), batch_size, str(path))


def _form_of(path: Path, form: Form) -> Form:
    """format = "csv" and the columns' names are of tables whose ending and first line do not say it."""
    return Form(text=form.text) if path.suffix.lower() in (*PARQUET, *ARROW, *JSON_LINES) else form


def _encoded(path: Path, held: Table, form: Form, batch_size: int) -> Iterator[InputBatch]:
    columns = encode_inputs(read_frame(path, replace(form, words=held.encoding.words)), held.encoding, str(path))
    total = len(next(iter(columns.values())))
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        batch: Batch = {name: values[start:stop] for name, values in columns.items()}
        yield InputBatch([f"{path}, row {row}" for row in range(start, stop)], _indexed(batch, stop - start), {})


def _read(made: Any, batch_size: int, where: str = "") -> Iterator[InputBatch]:
    """A sample that cannot be read is a problem of its own; the others make the batch."""
    plain = made.without_augmentation()
    for start in range(0, len(made), batch_size):
        names, samples, problems = [], [], {}
        for index in range(start, min(start + batch_size, len(made))):
            name = plain.id_of(index)
            names.append(f"{where}, {name}" if where and name.startswith("row ") else name)
            try:
                samples.append(plain.read(index, ChanceKey()))
            except BadSampleError as error:
                problems[index - start] = f"{error.what}: {error.got}"
        yield InputBatch(names, _indexed(plain.collate(samples), len(samples)) if samples else None, problems)


def _indexed(batch: Batch, size: int) -> Batch:
    return batch | {"index": torch.arange(size)}
