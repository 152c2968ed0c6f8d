"""The append-only record of a run, the one truth: every view can be rebuilt from it. Here is its form, and its reading.

One line of JSON a record.

A run that was killed goes on as a new attempt, whose first record is ``attempt_start`` with ``from_step``, the step of
the checkpoint that it took. What earlier attempts recorded beyond that step never happened: it is superseded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from ..errors import RunFolderError

Record = dict[str, Any]
"""One line: kind, attempt, rank, seq, step, samples, epoch, time, and what the kind adds."""

DETERMINISTIC_KINDS = ("scalars",)
"""Kinds that depend on the run's inputs alone; "timing" and the others hold what was measured."""

_TAIL_BYTES = 1 << 16
_BATCH_BYTES, _BLOCK_BYTES = 1 << 20, 1 << 24
_NEEDED = frozenset(("kind", "attempt", "step"))
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_VOLATILE = ("time", "attempt", "seq", "rank")


# --- the form of a line


def dump_record(record: Record) -> bytes:
    """One line, whatever the record holds: a number that is not finite as text, a foreign object as its text."""
    try:
        line = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        # orjson writes null for NaN: only a line with a null is looked at twice
        return line if b"null" not in line else _dump_slowly(record)
    except TypeError:
        return _dump_slowly(record)


def _dump_slowly(record: Record) -> bytes:
    try:
        plain = _plain(record)
    except RecursionError:
        plain = {key: value if isinstance(value, int | float) else _text(str(value)) for key, value in record.items()}
    return orjson.dumps(plain, option=orjson.OPT_APPEND_NEWLINE)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, float):
        return _finite(float(value))
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return _text(str(value))


def _finite(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _text(text: str) -> str:
    # a file name that is not UTF-8 reaches Python with lone surrogates, which JSON cannot hold
    return text.encode("utf-8", "replace").decode("utf-8")


# --- reading


def read_records(path: Path) -> Iterator[Record]:
    """Every record in the order of writing. A last line torn by a kill is left out.

    Raises:  RunFolderError naming the line, if any other is damaged, or if there is no such file
    """
    for number, line in _lines(path):
        yield _parse(line, path, number)


def kept_records(path: Path, kinds: Collection[str] | None = None) -> Iterator[Record]:
    """The records that are not superseded, as if the run had never been stopped.

    A record of attempt a is superseded if any later attempt began at a step before it. At the very step of the
    checkpoint it was written before the checkpoint and stays; where the next attempt says it again, as a run that
    was killed before its first checkpoint does at step 0, the first one counts.
    """
    for batch in kept_batches(path, kinds):
        yield from batch


def kept_batches(path: Path, kinds: Collection[str] | None = None) -> Iterator[list[Record]]:
    """The same, many at a time: what is read at once takes half the time."""
    last_step = superseded_after(path)
    said: dict[str, tuple[int, int]] = {}
    starts = None if kinds is None else tuple(f'{{"kind":"{kind}"'.encode() for kind in kinds)
    for batch in _batches(path, starts):
        if kinds is not None:
            batch = [record for record in batch if record["kind"] in kinds]
        if len(last_step) > 1:
            batch = [record for record in batch if record["step"] <= last_step.get(record["attempt"], math.inf)]
            batch = [record for record in batch if "values" not in record or _first_said(record, said)]
        yield batch


def _batches(path: Path, starts: tuple[bytes, ...] | None) -> Iterator[list[Record]]:
    """Whole lines as records, those first that may be of a kind that is wanted."""
    number = 0
    with _opened(path) as file:
        while lines := file.readlines(_BATCH_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            wanted = lines
            if starts is not None:
                wanted = [line for line in lines if line.startswith(starts) or not line.startswith(b'{"kind":"')]
            yield _parse_all(wanted, lines, path, number)
            number += len(lines)


def _parse_all(wanted: list[bytes], lines: list[bytes], path: Path, number: int) -> list[Record]:
    joined = b",".join(wanted)
    if b'"NaN"' not in joined and b'Infinity"' not in joined:
        try:
            found: list[Record] = orjson.loads(b"[" + joined + b"]")
            if len(found) == len(wanted) and all(map(_NEEDED.issubset, found)):
                return found
        except (ValueError, TypeError):
            pass  # one by one, so that the line is named
    places = {id(line): number + place for place, line in enumerate(lines, 1)}
    return [_parse(line, path, places[id(line)]) for line in wanted]


def _first_said(record: Record, said: dict[str, tuple[int, int]]) -> bool:
    """Take out of the record the tags that an earlier attempt said at this step; whether any is left."""
    step, attempt, values = record["step"], record["attempt"], record["values"]
    for tag in list(values):
        before_step, before_attempt = said.get(tag, (-1, attempt))
        if before_attempt < attempt and step <= before_step:
            del values[tag]
        else:
            said[tag] = step, attempt
    return bool(values)


def superseded_after(path: Path) -> dict[int, float]:
    """For each attempt the last step of it that counts; what it has recorded beyond is superseded."""
    starts: dict[int, int] = {}
    attempts = {0}
    for record in records_of(path, "attempt_start"):
        starts[record["attempt"]] = record["from_step"] if "from_step" in record else record["step"]
        attempts.add(record["attempt"])
    last: dict[int, float] = {}
    limit = math.inf
    for attempt in range(max(attempts), -1, -1):
        last[attempt] = limit
        limit = min(limit, starts.get(attempt, math.inf))
    return last


def canonical(path: Path) -> bytes:
    """The deterministic records without time and attempt: equal for a run killed any number of times and one never."""
    lines = []
    for record in kept_records(path, DETERMINISTIC_KINDS):
        steady = {key: value for key, value in record.items() if key not in _VOLATILE}
        lines.append(orjson.dumps(_plain(steady), option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def next_attempt(path: Path) -> int:
    """The number of the attempt that would begin now: 0 for a fresh or missing file."""
    try:
        last = _last_line(path)
    except FileNotFoundError:
        return 0
    return 0 if last is None else int(_parse(last, path, "last")["attempt"]) + 1


def last_step(path: Path) -> int:
    """The step of the last record; 0 for a fresh or missing file."""
    try:
        last = _last_line(path)
    except FileNotFoundError:
        return 0
    return 0 if last is None else int(_parse(last, path, "last")["step"])


def last_attempt_start(path: Path) -> Record | None:
    """How the newest attempt began. Other lines are not looked at, so damage among them hides nothing."""
    found = list(records_of(path, "attempt_start")) if path.exists() else []
    return found[-1] if found else None


def records_of(path: Path, kind: str) -> Iterator[Record]:
    """All records of one kind, superseded or not, without a look at the others: much faster than reading all."""
    start = f'{{"kind":"{kind}"'.encode()
    with _opened(path) as file:
        before = b"\n"
        while block := file.read(_BLOCK_BYTES):
            block += file.readline()
            place = 0 if block.startswith(start) and before.endswith(b"\n") else block.find(b"\n" + start) + 1 or -1
            while place >= 0:
                end = block.find(b"\n", place)
                if end >= 0:
                    yield _parse(block[place : end + 1], path, f"of kind {kind}")
                place = block.find(b"\n" + start, max(place, end)) + 1 or -1
            before = block


def _last_line(path: Path) -> bytes | None:
    """The last line that is whole, read from the end."""
    size, wanted = path.stat().st_size, _TAIL_BYTES
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - wanted))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        start = whole.rfind(b"\n", 0, -1) + 1
        if start or wanted >= size:
            return whole[start:] or None
        wanted *= 16


def lines_from(path: Path, place: int, most: int, most_bytes: int) -> Iterator[tuple[list[Record], int]]:
    """The records from a place in the file on, some at a time, each time with the place behind them."""
    with path.open("rb") as file:
        file.seek(place)
        while lines := file.readlines(most_bytes):
            if not lines[-1].endswith(b"\n"):
                lines.pop()  # it is being written now
            for start in range(0, len(lines), most):
                part = lines[start : start + most]
                place += sum(map(len, part))
                yield [_parse(line, path, f"before byte {place}") for line in part], place
            if not lines:
                return


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise RunFolderError("the record cannot be read", where=path, got=error.strerror or error) from None


def _parse(line: bytes, path: Path, number: int | str) -> Record:
    try:
        record = orjson.loads(line)
        if not isinstance(record, dict) or not record.keys() >= _NEEDED:
            raise ValueError("JSON that is no record")
    except ValueError as error:
        raise RunFolderError(
            "the record is damaged", where=f"{path}, line {number}", got=f"{line[:60]!r} ({error})",
            expected="one record as JSON a line",
            fix="restore the file from a copy, or take this line out: every other line stands for itself",
        ) from None  # fmt: skip
    if b'"NaN"' in line or b'Infinity"' in line:
        return {key: _floats(value) for key, value in record.items()}
    return record


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return _NOT_FINITE[value] if isinstance(value, str) and value in _NOT_FINITE else value
