"""The append-only record of a run, the one truth: every view can be rebuilt from it.

One line of JSON a record. The trainer's thread only queues; one daemon thread writes and then feeds the views.

A run that was killed goes on as a new attempt, whose first record is ``attempt_start`` with ``from_step``, the step of
the checkpoint that it took. What earlier attempts recorded beyond that step never happened: it is superseded.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson
from pydantic import Field, PositiveInt

from ..errors import RunFolderError, StorageError
from ..files import AppendFile
from ..settings import Settings

Record = dict[str, Any]
"""One line: kind, attempt, rank, seq, step, samples, epoch, time, and what the kind adds."""

DETERMINISTIC_KINDS = ("scalars",)
"""Kinds that depend on the run's inputs alone; "timing" and the others hold what was measured."""

_DRAIN_S = 0.1
_MAX_VIEW_ERRORS = 3
_CATCH_UP_RECORDS = 1000
_TAIL_BYTES = 1 << 16
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_VOLATILE = ("time", "attempt", "seq", "rank")


class MonitorSettings(Settings):
    """What a run shows of itself."""

    views: list[Literal["tensorboard"]] = Field(default=["tensorboard"])
    """Where the run is shown, besides the console."""
    log_every: PositiveInt | None = None
    """Steps between two log points; left out, 50."""


class View(Protocol):
    """Somewhere that shows the record.

    After a resume the view is given the earlier records once more, before the new ones, so that one that lost its
    tail, or all, catches up. It must show nothing twice.
    """

    def write(self, records: list[Record]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


# --- writing


class Recorder:
    """Writes the record of one attempt and feeds it to the views.

    ``on_record`` and ``on_alert`` are called on the writer's thread. A view that fails is counted, said once, left out
    after three errors, and never stops the training.
    """

    def __init__(
        self, path: Path, *, attempt: int, views: Sequence[View] = (),
        on_record: Sequence[Callable[[Record], None]] = (), on_alert: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.path = path
        self.attempt = attempt
        self.view_errors = 0
        self._outlets: list[_Outlet] = [*map(_ViewOutlet, views), *map(_CallbackOutlet, on_record)]
        self._on_alert = on_alert
        self._file = AppendFile(path)
        self._seq = 0
        self._queue: deque[tuple[str, int, int, int, float, dict[str, Any]]] = deque()
        self._unwritten: list[tuple[Record, bytes]] = []
        self._unseen: deque[Record] = deque()
        self._writing = threading.Lock()
        self._idle = False
        self._closing = False
        self._closed = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchkeep-records", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def log(self, kind: str, *, step: int, samples: int, epoch: int, **payload: Any) -> None:
        """Queue one record: no file is touched, nothing blocks or raises. The payload must not be changed later."""
        self._queue.append((kind, step, samples, epoch, time.time(), payload))
        if self._idle:
            self._idle = False
            self._wake.set()

    def flush(self, durable: bool = False) -> None:
        """Wait until all that was logged is in the file, and with ``durable`` on the disk. Views may lag behind.

        Raises:  StorageError where the disk refuses; what was logged is kept and tried again at the next call
        """
        with self._writing:
            self._write_queued()
            if durable:
                self._file.sync()

    def close(self) -> None:
        """Make the record durable, feed the views to the end and close them.

        Raises:  StorageError where the disk refuses the record
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            self.flush(durable=True)
        finally:
            self._closing = True
            self._hurry.set()
            self._wake.set()
            self._thread.join()
            self._file.close()

    def _run(self) -> None:
        """The writer's thread: sleeps without a timer while nothing is logged."""
        while not self._closing:
            # idle is raised before the queue is looked at, and log looks at idle after it appended: none is missed
            self._idle = True
            if not self._queue and not self._unseen:
                self._wake.wait()
            self._wake.clear()
            self._idle = False
            self._hurry.wait(_DRAIN_S)
            self._drain()
        self._drain()
        for outlet in self._outlets:
            self._guard(outlet, outlet.close)

    def _drain(self) -> None:
        try:
            with self._writing:
                self._write_queued()
        except StorageError:
            pass  # the lines are kept: flush meets the same refusal and raises it where the trainer can act
        self._feed()

    def _write_queued(self) -> None:
        """Append all that is queued in one write. Call with ``_writing`` held."""
        while self._queue:
            record = self._numbered(*self._queue.popleft())
            self._unwritten.append((record, dump_record(record)))
        if not self._unwritten:
            return
        lines = b"".join(line for _, line in self._unwritten)
        self._file.append(lines)
        self._unseen.extend(record for record, _ in self._unwritten)
        self._unwritten.clear()

    def _numbered(
        self, kind: str, step: int, samples: int, epoch: int, time_s: float, payload: dict[str, Any]
    ) -> Record:
        head = {"kind": kind, "attempt": self.attempt, "rank": 0, "seq": self._seq}
        self._seq += 1
        return {**head, "step": step, "samples": samples, "epoch": epoch, "time": time_s, **payload}

    def _feed(self) -> None:
        """Hand to the views what was written since the last time."""
        if not self._unseen:
            return
        records = [self._unseen.popleft() for _ in range(len(self._unseen))]
        if self.attempt and any(record["kind"] == "attempt_start" for record in records):
            self._catch_up()
        for outlet in self._outlets:
            self._guard(outlet, partial(outlet.write, records))

    def _catch_up(self) -> None:
        for outlet in self._outlets:
            if isinstance(outlet, _ViewOutlet):
                self._guard(outlet, partial(self._replay, outlet))

    def _replay(self, outlet: _ViewOutlet) -> None:
        batch: list[Record] = []
        for record in kept_records(self.path):
            if record["attempt"] == self.attempt:
                break
            batch.append(record)
            if len(batch) == _CATCH_UP_RECORDS:
                outlet.write(batch)
                batch = []
        if batch:
            outlet.write(batch)

    def _guard(self, outlet: _Outlet, act: Callable[[], None]) -> None:
        if outlet.errors >= _MAX_VIEW_ERRORS:
            return
        try:
            act()
        except Exception as error:
            self.view_errors += 1
            outlet.errors += 1
            if outlet.errors == 1 and self._on_alert is not None:
                with contextlib.suppress(Exception):  # nobody is left to tell
                    self._on_alert(f"{outlet.name} failed and the training goes on: {type(error).__name__}: {error}")


class _ViewOutlet:
    def __init__(self, view: View):
        self.name = type(view).__name__
        self.errors = 0
        self.view = view

    def write(self, records: list[Record]) -> None:
        self.view.write(records)

    def close(self) -> None:
        try:
            self.view.flush()
        finally:
            self.view.close()


class _CallbackOutlet:
    def __init__(self, callback: Callable[[Record], None]):
        self.name = getattr(callback, "__qualname__", type(callback).__name__)
        self.errors = 0
        self.callback = callback

    def write(self, records: list[Record]) -> None:
        for record in records:
            self.callback(record)

    def close(self) -> None:
        """A callback keeps nothing open."""


_Outlet = _ViewOutlet | _CallbackOutlet


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
    last_step = _last_steps(path)
    said: dict[str, tuple[int, int]] = {}
    for number, line in _lines(path):
        record = _parse(line, path, number)
        if kinds is not None and record["kind"] not in kinds:
            continue
        if record["step"] > last_step.get(record["attempt"], math.inf):
            continue
        if "values" in record and not _first_said(record, said):
            continue
        yield record


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


def _last_steps(path: Path) -> dict[int, float]:
    """For each attempt that was followed by another, the last step of it that counts."""
    starts: dict[int, int] = {}
    attempts = {0}
    for number, line in _lines(path):
        if b'"attempt_start"' in line:
            record = _parse(line, path, number)
            if record["kind"] == "attempt_start":
                starts[record["attempt"]] = record["from_step"] if "from_step" in record else record["step"]
                attempts.add(record["attempt"])
    last: dict[int, float] = {}
    limit = math.inf
    for attempt in range(max(attempts), -1, -1):
        last[attempt] = limit
        limit = min(limit, starts.get(attempt, math.inf))
    return last


def read_scalars(path: Path, kinds: Collection[str] = DETERMINISTIC_KINDS) -> list[Record]:
    """Rows {tag, value, step, epoch, samples, attempt, time} that are not superseded, in the order of writing."""
    shared = ("step", "epoch", "samples", "attempt", "time")
    return [
        {"tag": tag, "value": value, **{key: record[key] for key in shared}}
        for record in kept_records(path, kinds)
        for tag, value in record["values"].items()
    ]


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
    found = None
    for _, line in _lines(path) if path.exists() else ():
        if line.startswith(b'{"kind":"attempt_start"'):
            found = line
    return None if found is None else _parse(found, path, "of an attempt's start")


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


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise RunFolderError("the record cannot be read", where=path, got=error.strerror or error) from None
    with file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


def _parse(line: bytes, path: Path, number: int | str) -> Record:
    try:
        record = orjson.loads(line)
        if not isinstance(record, dict) or not {"kind", "attempt", "step"} <= record.keys():
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
