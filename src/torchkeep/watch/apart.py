"""Views that live in a process of their own: a client of a server, with its threads, hooks and time-outs.

Such a client takes milliseconds of the interpreter with every record, replaces ``sys.excepthook``, waits at the exit
of the process, and may hang with its server. Here it can do all that: the training hands records over a pipe, and ends
what does not answer. What a client prints goes to a file in the run's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..errors import SettingsError, StorageError
from ..files import FolderLock
from ..folder import RECORDS_FILE
from .feeds import Unreachable
from .media import MediaStore
from .records import Record, read_records, records_of

_MISSED = 900
_PROGRAM = "import sys; sys.path.append({root!r}); from torchkeep.watch.apart import serve; serve()"
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the cores and the GPU are the training's


def require(name: str) -> None:
    """Raises:  SettingsError where the package of a view is missing"""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a mere folder of that name is no package
        raise SettingsError(
            f"this needs the package {name}", where=f"view {name!r}", got="not installed",
            fix=f'pip install "torchkeep[{name}]"',
        )  # fmt: skip


class Apart:
    """A view whose sender ``module:name(folder, attempt, run_name, settings)`` runs in a process of its own.

    Raises:  SettingsError where the client's package is missing
    """

    name = ""
    sender = ""
    close_timeout_s = 60.0
    answer_s = 300.0

    def __init__(self, folder: Path, attempt: int, run_name: str, settings: Any):
        require(self.name)
        self.close_timeout_s = settings.close_timeout_s
        self._place = (folder / self.name).absolute()
        self._told = {
            "sender": self.sender, "folder": str(folder.absolute()), "attempt": attempt, "run_name": run_name,
            "settings": settings.model_dump(), "place": str(self._place), "patience_s": self.close_timeout_s,
        }  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, records: list[Record], media: MediaStore) -> None:
        self._ask(self.answer_s, "write", records)

    def flush(self) -> None:
        if self._process is not None:
            self._ask(self.answer_s, "flush")

    def close(self) -> None:
        if self._process is None:
            return
        try:
            # the feed tries to give the rest first, and the process is to be gone when it waits no longer
            self._ask(self.close_timeout_s * 0.6, "close")
        finally:
            self._end()

    def abandon(self) -> None:
        self._end()

    def _ask(self, patience_s: float, verb: str, *arguments: Any) -> None:
        process = self._process = self._process or self._begin()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([verb, *arguments]) + "\n")
            process.stdin.flush()
            answer = json.loads(self._answers.get(timeout=patience_s) or '{"gone": "its process ended"}')
        except queue.Empty:
            answer = {"gone": f"no answer within {patience_s:g} s"}
        except OSError as error:
            answer = {"gone": f"its process ended: {error}"}
        if "gone" in answer:
            self._end()
            raise Unreachable(f"{self.name}: {answer['gone']} ({self._place / 'client.log'})")
        if "later" in answer:
            raise Unreachable(answer["later"])
        if "error" in answer:
            raise RuntimeError(answer["error"])

    def _begin(self) -> subprocess.Popen[str]:
        self._place.mkdir(parents=True, exist_ok=True)
        self._answers = queue.SimpleQueue()
        program = _PROGRAM.format(root=str(Path(__file__).parents[2]))
        with (self._place / "client.log").open("ab") as log:
            # -P: a file in the working folder that is named as the client is not taken for it;
            # a session of its own: Ctrl-C is the training's
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, json.dumps(self._told)], env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=_read_answers, args=(process, self._answers), daemon=True).start()
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()


def _read_answers(process: subprocess.Popen[str], answers: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put(line)
    answers.put("")


# --- in the process


def serve() -> None:
    """Do what is asked, line by line. Once the training is gone what it has handed over is still sent."""
    told = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a client prints is no answer
    with contextlib.suppress(AttributeError, OSError):
        os.nice(5)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_asked, args=(asked, told["patience_s"]), daemon=True).start()
    sender: Attempts | None = None
    lock: FolderLock | None = None
    while line := asked.get():
        verb, *arguments = json.loads(line)
        try:
            lock = lock or FolderLock(Path(told["place"])).acquire()
            sender = sender or _make(told)
            getattr(sender, verb)(*arguments)
            answer = {}
        except Exception as error:
            # without a sender: another process still ends an earlier attempt's view, or nothing works here
            is_later = sender is None or isinstance(error, OSError | StorageError)
            answer = {"later" if is_later else "error": f"{type(error).__name__}: {error}"}
            sys.stderr.write(f"{answer}\n")
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            replies.write(json.dumps(answer) + "\n")
            replies.flush()
    with contextlib.suppress(Exception):
        if sender is not None:
            sender.close()
    if lock is not None:
        lock.release()
    os._exit(0)  # clients wait for their servers at the exit of a process


def _read_asked(asked: queue.SimpleQueue[str], patience_s: float) -> None:
    for line in sys.stdin:
        asked.put(line)
    asked.put("")
    time.sleep(patience_s)
    os._exit(1)


def _make(told: dict[str, Any]) -> Attempts:
    module, name = told["sender"].split(":")
    sender: Attempts = getattr(importlib.import_module(module), name)(
        Path(told["folder"]), told["attempt"], told["run_name"], told["settings"]
    )
    return sender


class Attempts(ABC):
    """What senders have in common: each attempt is a run at the server, sent whole whatever became of earlier clients.

    ``live`` is the attempt that runs; -1 where none does, and all are looked at again. A sender has ``begin``, which
    opens an attempt's run and sets ``seq`` to what is not to be sent again (or tells by False that nothing is),
    ``send`` and ``end``. They raise OSError where the server is not there.
    """

    def __init__(self, folder: Path, attempt: int, run_name: str, settings: dict[str, Any]):
        self.folder, self.live, self.name, self.settings = folder, attempt, run_name, settings
        self.media = MediaStore(folder)
        self.attempt = self.seq = -1
        self.is_open = False

    @abstractmethod
    def begin(self, first: Record) -> bool: ...

    @abstractmethod
    def send(self, records: list[Record]) -> None: ...

    @abstractmethod
    def end(self, is_whole: bool) -> None: ...

    def write(self, records: list[Record]) -> None:
        for attempt, group in groupby(records, itemgetter("attempt")):
            part = list(group)
            if attempt != self.attempt:
                self._begin(part[0])
            if self.is_open:
                self.send([record for record in part if record["seq"] > self.seq])

    def flush(self) -> None:  # noqa: B027 - a sender may have something that waits
        """Nothing waits here."""

    def close(self) -> None:
        self._end(is_whole=True)

    def _begin(self, first: Record) -> None:
        self._end(is_whole=True)
        self.seq = -1
        self.is_open = self.begin(first)
        missed = self._records(first["attempt"], self.seq + 1, first["seq"]) if self.is_open else iter(())
        while batch := list(islice(missed, _MISSED)):  # what a client that was ended has taken with it
            self._send_kept(batch)
        self.attempt = first["attempt"]

    def _end(self, is_whole: bool) -> None:
        if self.is_open:
            self.end(is_whole)
        self.is_open, self.attempt = False, -1

    def _send_kept(self, batch: list[Record]) -> None:
        """Send what can be shown: a record that cannot was left out before."""
        try:
            self.send(batch)
        except OSError:
            raise
        except Exception as error:
            if len(batch) == 1:
                sys.stderr.write(f"record {batch[0]['seq']} is left out: {error}\n")
                return
            for record in batch:
                if record["seq"] > self.seq:
                    self._send_kept([record])

    def _records(self, attempt: int, first: int, before: int) -> Iterator[Record]:
        """An attempt's records from one ``seq`` to before another."""
        records = read_records(self.folder / RECORDS_FILE) if first < before else iter(())
        return (row for row in records if row["attempt"] == attempt and first <= row["seq"] < before)

    def run_id(self) -> str:
        """What names the run at a server, whatever its folder is called: from how its record begins."""
        with (self.folder / RECORDS_FILE).open("rb") as file:
            return hashlib.sha256(file.readline()).hexdigest()[:16]

    def run_start(self) -> Record:
        """How the run began; empty where the record does not say."""
        return next(records_of(self.folder / RECORDS_FILE, "run_start"), {})

    def source(self, record: Record) -> Path:
        """The file or folder that an artifact's record names."""
        return self.media.path(record["media"]) if record.get("media") else self.folder / record["path"]

    def is_model(self, record: Record) -> bool:
        """Whether this artifact is one that is uploaded where ``models`` is set."""
        return bool(self.settings["models"]) and (record["type"] == "package" or record["name"] == "best")
