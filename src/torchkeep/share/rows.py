"""Predictions as rows of CSV, JSON lines or Parquet: as they come, or in a file that survives a kill of the job.

A row has ``input``, ``label``, ``probability``, ``value`` and ``error``; with more than one likeliest class also
``label_2``, ``probability_2`` and so on in CSV (of a model of several labels from ``label_1`` on), a list ``top``
elsewhere; where several numbers are said a list ``values``. A cell stays as it is: one that begins with = is a formula
to some spreadsheets.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .. import __version__
from ..contracts import Json
from ..data.readers import Reader
from ..errors import RunFolderError, SettingsError
from ..files import AppendFile, lock_byte, replacing, reported
from ..tensors import tensor_sha256, to_json
from .predict import Prediction, Predictor

Form = Literal["csv", "jsonl", "parquet"]
Row = dict[str, Any]

_DIGITS = 6  # of a probability
_SYNC_S = 5.0
_ROWS_AT_ONCE = 1 << 14  # in memory, and in one row group of Parquet
_LOCKED = 1 << 40  # a byte that no part reaches


def row_of(said: Prediction) -> Row:
    """What is written of a prediction."""
    row: Row = {name: _text(value) if isinstance(value, str) else value for name, value in said.row().items()}
    if "probability" in row:
        row["probability"] = round(row["probability"], _DIGITS)
    if "top" in row:
        row["top"] = [{"label": _text(label), "probability": round(p, _DIGITS)} for label, p in row["top"]]
    if "values" in row:
        row["values"] = list(row["values"])
    return row


def _text(value: str) -> str:
    """What has a place in every form: bytes that are no UTF-8, in a name of a class for one, as escapes."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


class Rows:
    """The form in which rows of a predictor are written."""

    def __init__(self, predictor: Predictor, form: Form):
        contract = predictor.asked.contract
        target, num_classes = contract.target, len(contract.classes)
        self.form = form
        self.num_top = min(predictor.top, num_classes or predictor.top)
        self.first_top = 1 if target is not None and target.kind == "multilabel" else 2
        has_several = contract.loss == "mse" and (target is None or target.shape not in (None, (), (1,)))
        self.values = ["values"] if has_several else []

    def head(self) -> bytes:
        """What stands before the first row."""
        return self._line(self._columns()) if self.form == "csv" else b""

    def lines(self, rows: Iterable[Row]) -> bytes:
        """Rows as lines of text."""
        if self.form == "csv":
            columns = self._columns()
            return b"".join(self._line([_flat(row).get(name) for name in columns]) for row in rows)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    def write(self, rows: Iterator[Row], file: IO[bytes]) -> None:
        """All of it into a file, a few thousand rows at a time."""
        parts = iter(lambda: list(itertools.islice(rows, _ROWS_AT_ONCE)), [])
        if self.form != "parquet":
            file.write(self.head())
            for part in parts:
                file.write(self.lines(part))
            return
        schema = self._schema()
        with pq.ParquetWriter(file, schema) as writer:
            for part in parts:
                writer.write_table(pa.Table.from_pylist(part, schema))

    def _columns(self) -> list[str]:
        ranks = range(self.first_top, self.num_top + 1) if self.num_top > 1 else ()
        more = [f"{name}_{rank}" for rank in ranks for name in ("label", "probability")]
        return ["input", "label", "probability", *more, "value", *self.values, "error"]

    def _line(self, cells: Sequence[Any]) -> bytes:
        return (",".join(map(_cell, cells)) + "\n").encode()

    def _schema(self) -> Any:
        text, number = pa.string(), pa.float64()
        top = pa.list_(pa.struct({"label": text, "probability": number}))
        kinds = {"input": text, "label": text, "probability": number}
        kinds |= {"top": top} if self.num_top > 1 else {}
        return pa.schema(kinds | {"value": number, **dict.fromkeys(self.values, pa.list_(number)), "error": text})


def _flat(row: Row) -> Row:
    for rank, said in enumerate(row.get("top", ()), 1):
        row = row | {f"{name}_{rank}": value for name, value in said.items()}
    return row


def _cell(value: Any) -> str:
    """RFC 4180, which quotes a carriage return too: Python's csv leaves it bare."""
    text = "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text


def inputs_of(reader: Reader, words: Sequence[str], stdin: Callable[[], bytes]) -> tuple[Any, list[Path], bytes]:
    """What the words of a command name: the inputs, their paths, and what stood on standard input ("-") in their place.

    Raises:  DataError for a path that is not there; SettingsError for a table or texts beside other inputs
    """
    paths: list[Path] = []
    for word in words:
        given = reader.given(data := stdin()) if word == "-" else [Path(word)]
        if isinstance(given, list) and isinstance(given[0], Path):
            paths += map(Path, given)
        elif len(words) > 1:
            raise SettingsError("standard input holds the inputs themselves, and stands alone", where="-",
                                got=f"{len(words)} inputs", expected="- or paths")  # fmt: skip
        else:
            return given, [], data
    found = reader.found(paths)
    return found, found, b""


def stream_rows(predictor: Predictor, inputs: Any, form: Form) -> Iterator[tuple[bytes, int, int]]:
    """Lines as they come, a batch at a time, with how many rows they are and how many of these say an error."""
    rows = Rows(predictor, form)
    head = rows.head
    with contextlib.closing(predictor.batches(inputs)) as batches:
        for said in batches:  # inputs that cannot be used at all are said before the head is out
            found = list(map(row_of, said))
            yield head() + rows.lines(found), len(found), sum("error" in row for row in found)
            head = bytes


def job_of(predictor: Predictor, paths: Sequence[Path], given: bytes) -> dict[str, Json]:
    """What tells a job from another: the model, the inputs (names, sizes, times, and what was given), the options."""
    asked, digest = predictor.asked, xxhash.xxh3_128(given)
    contract, tensors = asked.contract, dict(asked.model.named_parameters()) | dict(asked.model.named_buffers())
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
        digest.update(os.fsencode(path) + b"\0")
    said = [str(asked.model), contract.schema.to_json(), contract.loss, contract.temperature, contract.precision]
    model = f"{tensor_sha256(tensors)} {xxhash.xxh3_128_hexdigest(to_json(said))}"
    options = [predictor.batch_size, predictor.top, asked.device.type]
    return {"torchkeep": __version__, "model": model, "inputs": digest.hexdigest(), "options": options}


def write_rows(
    predictor: Predictor, inputs: Any, output: Path, form: Form, job: dict[str, Json], seen: Callable[[int], None],
    told: Callable[[str], None],
) -> int:  # fmt: skip
    """Predict all inputs into a file that appears whole; how many rows say an error. ``seen`` hears of each batch's
    rows, ``told`` what an earlier job left.

    What is finished stands in a part beside the output; the same job, run again, goes on behind it.
    Raises:  StorageError where the disk refuses; RunFolderError where another process writes this output; as
             ``Predictor.stream`` does
    """
    rows, part = Rows(predictor, form), output.with_name(f".{output.name}.part")
    with _opened(part, output) as file:
        try:
            done = _finished(part, job, told)
            if done[1]:
                seen(done[1])
            _go_on(file, predictor.batches(inputs, first=done[0]), job if done == (0, 0) else None, seen)
            num_bad = _written(rows, part, output)
        except BaseException:
            num_done = _finished(part, job, lambda _: None)[1]
            if num_done:
                told(f"{num_done:,} rows are kept in {part}: the same command goes on behind them")
            else:
                part.unlink(missing_ok=True)
            raise
    part.unlink()
    return num_bad


@contextlib.contextmanager
def _opened(part: Path, output: Path) -> Iterator[AppendFile]:
    with reported(part):
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock_byte(handle, _LOCKED, "exclusive", waits=False):
            raise RunFolderError("another process writes this output", where=output, got="its part is locked",
                                 fix="wait for it to end, or name another output")  # fmt: skip
        with contextlib.closing(AppendFile(part)) as file:
            yield file
    finally:
        os.close(handle)


def _finished(part: Path, job: dict[str, Json], told: Callable[[str], None]) -> tuple[int, int]:
    """Batches and rows that an earlier job has left; the part is emptied where that was another job."""
    try:
        with part.open("rb") as file:
            head = dict(orjson.loads(file.readline() or b"{}"))
            counts = [len(orjson.loads(line)) for line in file]
    except (ValueError, TypeError):
        head, counts = {"damaged": True}, []
    if head == job and counts:
        told(f"{sum(counts):,} rows were finished before")
        return len(counts), sum(counts)
    if head and head != job:
        other = ", ".join(name for name in job if head.get(name) != job[name])
        told(f"what is in {part} is of another job, whose {other} differ: it is started over")
    os.truncate(part, 0)
    return 0, 0


def _go_on(
    file: AppendFile, batches: Generator[list[Prediction], None, None], head: Any, seen: Callable[[int], None]
) -> None:
    synced = time.monotonic()
    with contextlib.closing(batches):
        for said in batches:
            found = list(map(row_of, said))
            # a batch is a line: half of one would put the next ones together otherwise, and so change their bits
            file.append((b"" if head is None else orjson.dumps(head) + b"\n") + orjson.dumps(found) + b"\n")
            head = None
            seen(len(found))
            if time.monotonic() > synced + _SYNC_S:
                file.sync()
                synced = time.monotonic()


def _written(rows: Rows, part: Path, output: Path) -> int:
    num_bad = 0

    def found() -> Iterator[Row]:
        nonlocal num_bad
        with part.open("rb") as lines:
            lines.readline()
            for row in itertools.chain.from_iterable(map(orjson.loads, lines)):
                num_bad += "error" in row
                yield row

    with replacing(output) as file:
        rows.write(found(), file)
    return num_bad
