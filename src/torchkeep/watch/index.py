"""An index over many runs in one SQLite file beside them. It is rebuilt from their records, and may be deleted.

Each run is read again where its record has changed; of the newest runs run.json and the lock are looked at too. So of
an old run three things are seen late, with its next record: that it has begun to go on, and that its run.json was
replaced or damaged.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..contracts import Json
from ..errors import RunFolderError
from ..files import LOCK, FolderLock
from ..folder import RECORDS_FILE, RUN_FILE, RunFolder
from .conditions import FACTS, Condition, find_key
from .records import Record, lines_from, superseded_after

T = TypeVar("T")
Row = dict[str, Json]

INDEX_FILE = ".torchkeep-index.sqlite"
_FILES = tuple(b"/" + os.fsencode(name) for name in (RECORDS_FILE, RUN_FILE, LOCK))
_VERSION = 0x746B01
_BUSY_S = 10.0
_NUM_RECENT = 300  # three looks at each of 10,000 runs take more than the tenth of a second that a query may take
_BATCH_RUNS = 256
_BATCH_RECORDS, _BATCH_BYTES = 10_000, 1 << 20
_TABLES = (
    "CREATE TABLE run (id INTEGER PRIMARY KEY, folder BLOB UNIQUE, time INTEGER, size INTEGER, marks TEXT, "
    "status TEXT, created REAL)",
    "CREATE INDEX run_by_age ON run (created, folder)",
    "CREATE TABLE detail (run INTEGER PRIMARY KEY, course TEXT, row TEXT)",  # apart: the others are read all at once
    "CREATE TABLE key (id INTEGER PRIMARY KEY, name TEXT UNIQUE)",
    "CREATE TABLE value (key INTEGER, run INTEGER, number REAL, text TEXT, PRIMARY KEY (key, run)) WITHOUT ROWID",
    "CREATE INDEX value_of_run ON value (run)",
    f"PRAGMA user_version = {_VERSION}",
)
_KEEPING = (
    "INSERT INTO run (folder, time, size, marks, status, created) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (folder) DO "
    "UPDATE SET time = excluded.time, size = excluded.size, marks = excluded.marks, status = excluded.status, "
    "created = excluded.created RETURNING id"
)
_REFUSALS = (
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM,
)  # fmt: skip
_MEASURED = ("scalars", "timing", "system")


# --- one run


@dataclass
class Course:
    """What the record says of a run's course, read up to ``place``: a record that has grown is read on from there."""

    place: int = 0
    attempts: int = 0
    began: float | None = None
    time: float = 0.0
    seconds: float = 0.0
    step: int = 0
    epoch: int = 0
    ended: str | None = None
    metric: str | None = None
    mode: str = "auto"
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    settings: Json = None

    def take(self, record: Record, is_kept: bool) -> None:
        """Go on by one record. Time between two attempts is not counted."""
        kind, said_at = record["kind"], record.get("time", self.time)
        if record["attempt"] < self.attempts:
            self.seconds += max(0.0, said_at - self.time)
        self.time, self.attempts = said_at, record["attempt"] + 1
        self.began = said_at if self.began is None else self.began
        if not is_kept:
            return
        self.step, self.epoch = record["step"], record.get("epoch", self.epoch)
        if kind in _MEASURED:
            self.last |= record["values"]
            if kind == "scalars":
                self._judge(record["values"])
        elif kind == "run_end":
            self.ended = record.get("status")
            self.last |= record.get("metrics") or {}
        elif kind == "attempt_start":
            self.ended = None
            self.settings = record.get("settings") or self.settings

    def _judge(self, values: dict[str, float]) -> None:
        """Keep the evaluation that is the best by the run's metric; where it names none, by the first one measured."""
        if self.metric is None:
            found = (tag for tag in values if tag.startswith("valid/"))
            self.metric = min(found, key=is_less_better, default=None)
        metric = self.metric
        if metric not in values or metric is None or math.isnan(values[metric]):
            return
        if metric not in self.best or is_better(metric, values[metric], self.best[metric], self.mode):
            self.best = {tag: value for tag, value in values.items() if tag.startswith("valid/") or tag == metric}


def is_less_better(tag: str) -> bool:
    """Whether less of a metric is better, from its name, as for a run's own choice of its best checkpoint."""
    return tag.endswith(("loss", "error", "perplexity"))


def is_better(tag: str, value: float, other: float, mode: str = "auto") -> bool:
    """Whether a value of a metric beats another. ``mode`` is "min", "max" or "auto"."""
    return value < other if mode == "min" or (mode == "auto" and is_less_better(tag)) else value > other


def read_course(path: Path, course: Course) -> Course:
    """Go on reading where ``course`` ends; a new attempt may take back what was read, so then all is read again.

    Raises:  RunFolderError for a damaged record
    """
    goes_on = course.place > 0
    limits = {} if goes_on else superseded_after(path)
    for records, place in lines_from(path, course.place, _BATCH_RECORDS, _BATCH_BYTES):
        if goes_on and any(record["kind"] == "attempt_start" for record in records):
            return read_course(path, Course(metric=course.metric, mode=course.mode))
        for record in records:
            course.take(record, record["step"] <= limits.get(record["attempt"], math.inf))
        course.place = place
    return course


def read_facts(path: Path) -> Json:
    """run.json, empty where a hand loop has only a record.

    Raises:  RunFolderError where it cannot be read
    """
    return RunFolder(path).read_run() if (path / RUN_FILE).exists() else {}


def settings_of(facts: Json, course: Course) -> Json:
    """The settings that a run used last: a recipe's, or those of ``tk.fit``, or what a hand loop gave."""
    return course.settings or facts.get("recipe") or facts.get("settings") or {}


def best_choice(facts: Json) -> tuple[str | None, str]:
    """The metric that chooses a run's best checkpoint, and whether less or more of it is better."""
    kept = (facts.get("recipe") or facts.get("settings") or {}).get("checkpoint") or {}
    decided = [str(row["value"]) for row in facts.get("decisions", []) if row["name"] == "best"]
    found = re.fullmatch(r"(.+) \((min|max)\)", decided[-1]) if decided else None
    return (found[1], found[2]) if found else (kept.get("metric"), kept.get("mode", "auto"))


def run_row(path: Path, course: Course | None = None) -> tuple[Row, Course]:
    """A run as one flat row, and how far its record was read. What cannot be read is a row that says so."""
    row: Row = dict.fromkeys(FACTS) | {"name": path.name.encode("utf-8", "replace").decode(), "status": "unreadable"}
    try:
        facts = read_facts(path)
        metric, mode = best_choice(facts)
        course = course or Course(metric=metric, mode=mode)
        if (path / RECORDS_FILE).exists():  # else it was killed before it recorded anything
            course = read_course(path / RECORDS_FILE, course)
    except (RunFolderError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        return row | {"problem": getattr(error, "what", f"{type(error).__name__}: {error}")}, Course()
    row["status"] = "running" if _is_held(path) else course.ended or "killed"
    return row | _facts(facts, course) | _details(facts, course), course


def _facts(facts: Json, course: Course) -> Row:
    settings, objects = settings_of(facts, course), facts.get("objects") or {}
    model, data = settings.get("model"), settings.get("data")
    best = course.best.get(course.metric or "")
    return {
        "attempts": course.attempts, "created": facts.get("created", course.began),
        "model": model.get("name") if isinstance(model, dict) else model or objects.get("model"),
        "commit": (facts.get("code") or {}).get("commit"), "seconds": round(course.seconds, 3), "step": course.step,
        "best_metric": None if best is None else course.metric, "best": best, "epoch": course.epoch,
        "seed": facts.get("seed", settings.get("seed")),
        "data": data.get("train") if isinstance(data, dict) else data or objects.get("train"),
    }  # fmt: skip


def _details(facts: Json, course: Course) -> Row:
    """Metrics, settings by dotted keys, and the fingerprints of the data."""
    from ..settings import flatten  # loads pydantic, which takes longer than a query

    found = {f"best.{tag}": value for tag, value in course.best.items()}
    found |= {f"last.{tag}": value for tag, value in course.last.items()}
    found |= flatten((facts.get("data") or {}).get("fingerprints", {}), "fingerprint")
    found |= {key: value for key, value in flatten(settings_of(facts, course)).items() if key not in FACTS}
    return {key: value for key, value in found.items() if value is not None and key}


def _is_held(path: Path) -> bool:
    # a lock that was given back is empty: asking the system for it could stand in the way of one who begins just now
    lock = path / LOCK
    with suppress(OSError):
        return lock.stat().st_size > 0 and FolderLock.is_held(path)
    return False


# --- the index


class RunIndex:
    """The runs directly under a folder, as rows to filter and sort.

    Where the folder cannot be written to, the index is built in memory each time. A damaged one, or one of another
    version, is built anew. Several processes may use it at once.
    """

    def __init__(self, runs: Path):
        self.runs = runs
        self._path = runs / INDEX_FILE
        self._db = self._opened()

    def refresh(self) -> None:
        """Read what has changed since the last time."""
        self._tried(self._refresh)

    def query(self, where: str = "", sort: str = "", most: int | None = 50) -> list[Row]:
        """Rows of the runs for which ``where`` holds, oldest first, else by ``sort``: "valid/accuracy desc" or "-KEY".

        ``most`` keeps the newest, or the first of those sorted. A comparison with what a run does not have is false.

        Raises:  SettingsError for a condition that cannot be read, with the place in it
        """

        def ask() -> list[Row]:
            with _transaction(self._db, "DEFERRED"):
                return self._query(where, sort, most)

        return self._tried(ask)

    def close(self) -> None:
        self._db.close()

    def _opened(self) -> sqlite3.Connection:
        root = os.fsencode(self.runs) + b"/"
        # no file is left in a folder without runs
        if self._path.exists() or any(_is_run(root + name) for name in _folders(self.runs)):
            with suppress(sqlite3.OperationalError):
                return _ready(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None))
        return _ready(sqlite3.connect(":memory:", isolation_level=None))

    def _tried(self, work: Callable[[], T]) -> T:
        """Work with the index; with a copy in memory where it cannot be written, with a new one where it is damaged."""
        try:
            return work()
        except (sqlite3.Error, ValueError, TypeError) as error:
            if getattr(error, "sqlite_errorcode", -1) & 0xFF in _REFUSALS:
                memory = sqlite3.connect(":memory:", isolation_level=None)
                with suppress(sqlite3.Error):
                    self._db.backup(memory)
                self._db.close()
                self._db = _ready(memory)
            else:
                self._db.close()
                for name in (INDEX_FILE, f"{INDEX_FILE}-journal"):
                    with suppress(OSError):
                        (self.runs / name).unlink()
                self._db = self._opened()
        self._refresh()
        return work()

    def _refresh(self) -> None:
        known = {row[0]: row for row in self._db.execute("SELECT folder, time, size, status FROM run")}
        newest = "SELECT folder, marks FROM run ORDER BY created DESC LIMIT ?"
        recent = dict(self._db.execute(newest, (_NUM_RECENT,)).fetchall())
        root, found = os.fsencode(self.runs) + b"/", set(_folders(self.runs))
        stale = (name for name in found if _is_stale(root + name, known.get(name), recent.get(name)))
        while batch := list(islice(stale, _BATCH_RUNS)):
            self._write([self._read(root, name) for name in batch])
        gone = [(name,) for name in known if name not in found]
        if gone:
            with _transaction(self._db):
                for table in ("value", "detail"):
                    where = "run IN (SELECT id FROM run WHERE folder = ?)"
                    self._db.executemany(f"DELETE FROM {table} WHERE {where}", gone)  # noqa: S608 (of two tables)
                self._db.executemany("DELETE FROM run WHERE folder = ?", gone)

    def _read(self, root: bytes, name: bytes) -> tuple[Any, ...]:
        """What the tables hold of one run. Its files are marked before they are read, so that no change is missed."""
        folder = root + name
        record, marks = _stat(folder, _FILES[0]), _marks(folder)
        before = self._db.execute(
            "SELECT size, marks, course FROM run JOIN detail ON run = id WHERE folder = ?", (name,)
        ).fetchone()
        # the same files, of which the record has grown: it is read on from where it ended
        goes_on = before and record and _files_of(marks) == _files_of(before[1]) and record.st_size >= before[0]
        course = Course(**json.loads(before[2])) if goes_on else None
        row, course = run_row(Path(os.fsdecode(folder)), course)
        return name, record and record.st_mtime_ns, record and record.st_size, marks, row, course

    def _write(self, runs: Sequence[tuple[Any, ...]]) -> None:
        with _transaction(self._db):
            names = {(key,) for *_, row, _ in runs for key in row}
            self._db.executemany("INSERT OR IGNORE INTO key (name) VALUES (?)", sorted(names))
            keys = dict(self._db.execute("SELECT name, id FROM key"))
            for *marks, row, course in runs:
                (run,) = self._db.execute(_KEEPING, (*marks, row["status"], row["created"])).fetchone()
                texts = json.dumps(asdict(course)), json.dumps(row)
                self._db.execute("INSERT OR REPLACE INTO detail VALUES (?, ?, ?)", (run, *texts))
                self._db.execute("DELETE FROM value WHERE run = ?", (run,))
                cells = [(keys[key], run, *_cell(value)) for key, value in row.items() if value is not None]
                self._db.executemany("INSERT INTO value VALUES (?, ?, ?, ?)", cells)

    def _query(self, where: str, sort: str, most: int | None) -> list[Row]:
        keys = dict(self._db.execute("SELECT name, id FROM key"))
        if not keys:
            return []
        by_age = [run for (run,) in self._db.execute("SELECT id FROM run ORDER BY created, folder")]
        kept = Condition(where, keys, self._db, set(by_age)).runs() if where.strip() else set(by_age)
        found = [run for run in by_age if run in kept]
        if sort.strip():
            found = self._sorted(found, sort, keys)[:most]
        elif most is not None:
            found = found[max(0, len(found) - most) :]
        read = (self._db.execute("SELECT row FROM detail WHERE run = ?", (run,)).fetchone() for run in found)
        return [json.loads(row[0]) for row in read]

    def _sorted(self, runs: list[int], sort: str, keys: dict[str, int]) -> list[int]:
        """By a key: numbers, then texts, then the runs that lack it, whichever way."""
        name, _, way = sort.strip().rpartition(" ")
        if way.lower() not in ("asc", "desc"):
            name, way = sort.strip(), ""
        key = find_key(name.removeprefix("-").strip(), keys, f"--sort {sort}")
        found = self._db.execute("SELECT run, number, text FROM value WHERE key = ?", (key,))
        values = {run: (number, text) for run, number, text in found}
        is_down = name.startswith("-") or way.lower() == "desc"
        parts: list[list[int]] = [[], [], []]
        for run in runs:
            number, text = values.get(run, (None, None))
            parts[0 if number is not None else 1 if text is not None else 2].append(run)
        for place, part in enumerate(parts[:2]):
            part.sort(key=lambda run: values[run][place], reverse=is_down)
        return [*parts[0], *parts[1], *parts[2]]


def _ready(db: sqlite3.Connection) -> sqlite3.Connection:
    """Make the tables where they are missing or of another version."""
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.OperationalError:
        db.close()
        raise
    except sqlite3.DatabaseError:  # damaged: the first work with it says so too
        return db
    if version != _VERSION:
        with _transaction(db):
            _make_tables(db)
    return db


def _make_tables(db: sqlite3.Connection) -> None:
    if db.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
        return  # another process has just done it
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        db.execute(f'DROP TABLE "{name}"')
    for statement in _TABLES:
        db.execute(statement)


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _folders(runs: Path) -> Iterator[bytes]:
    with suppress(OSError), os.scandir(os.fsencode(runs)) as entries:
        for entry in entries:
            if not entry.name.startswith(b".") and entry.is_dir():
                yield entry.name


def _stat(folder: bytes, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(folder + name)
    except OSError:
        return None


def _is_run(folder: bytes) -> bool:
    return bool(_stat(folder, _FILES[0]) or _stat(folder, _FILES[1]))


def _is_stale(folder: bytes, known: tuple[bytes, int, int, str] | None, marks: str | None) -> bool:
    if known is None:
        return _is_run(folder)
    _, time, size, status = known
    record = _stat(folder, _FILES[0])
    if (record.st_mtime_ns, record.st_size) != (time, size) if record else time is not None:
        return True
    if status == "running" and not _is_held(Path(os.fsdecode(folder))):
        return True
    return marks is not None and _marks(folder) != marks


def _marks(folder: bytes) -> str:
    """What tells whether the files of a run are those that were read."""
    found = [_stat(folder, name) for name in _FILES]
    files = "/".join(str(file.st_ino if file else "-") for file in found[:2])
    return " ".join([files, *(f"{file.st_mtime_ns}/{file.st_size}" if file else "-" for file in found[1:])])


def _files_of(marks: str) -> list[str]:
    return marks.split()[:2]


def _cell(value: Json) -> tuple[float | None, str | None]:
    """A value as a number or as a text."""
    if isinstance(value, bool):
        return None, str(value).lower()
    if isinstance(value, int | float):
        return (None, "nan") if math.isnan(value) else (float(value), None)
    return None, plain_text(value)


def plain_text(value: Json) -> str:
    """A value of a setting on one line: lists with commas, the rest as JSON."""
    if isinstance(value, list):
        return ", ".join(map(plain_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def csv_text(rows: Iterable[Row]) -> str:
    """Rows as CSV, with a column for each key that any of them has."""
    rows = list(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: plain_text(value) for key, value in row.items() if value is not None} for row in rows)
    return file.getvalue()
