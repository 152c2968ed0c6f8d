"""Views that live in a process of their own: a client of a server, with its threads, hooks and time-outs.

Such a client takes milliseconds of the interpreter with every record, replaces ``sys.excepthook``, waits at the exit
of the process, and may hang with its server. Here it can do all that: the training hands records over a pipe, and ends
what does not answer. What a client prints goes to a file in the run's folder.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import SettingsError, StorageError
from ..files import FolderLock
from ..folder import RECORDS_FILE
from .feeds import Unreachable
from .media import MediaStore
from .records import Record, read_records, records_of

_PROGRAM = "import sys; sys.path.append({root!r}); from torchkeep.watch.apart import serve; serve()"
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the cores and the GPU are the training's


class Sender(Protocol):
    """What the process runs. ``write`` and ``close`` raise OSError where the same is to be tried again later."""

    def write(self, records: list[Record]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Apart:
    """A view whose sender ``module:name(folder, attempt, run_name, settings)`` runs in a process of its own.

    Raises:  SettingsError where the client's package is missing
    """

    name = ""
    sender = ""
    close_timeout_s = 60.0
    answer_s = 300.0

    def __init__(self, folder: Path, attempt: int, run_name: str, settings: Any):
        found = importlib.util.find_spec(self.name)
        if found is None or found.origin is None:  # a mere folder of that name is no package
            raise SettingsError(
                f"this needs the package {self.name}", where=f"view {self.name!r}", got="not installed",
                fix=f'pip install "torchkeep[{self.name}]"',
            )  # fmt: skip
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
            # the feed waits only so long, and the process is to be gone by then
            self._ask(self.close_timeout_s * 0.9, "close")
        finally:
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
    sender: Sender | None = None
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
            print(answer, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            print(json.dumps(answer), file=replies, flush=True)
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


def _make(told: dict[str, Any]) -> Sender:
    module, name = told["sender"].split(":")
    sender: Sender = getattr(importlib.import_module(module), name)(
        Path(told["folder"]), told["attempt"], told["run_name"], told["settings"]
    )
    return sender


def run_id(folder: Path) -> str:
    """What names a run at a server, whatever its folder is called: from how its record begins."""
    import hashlib

    with (folder / RECORDS_FILE).open("rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:16]


def attempt_records(folder: Path, attempt: int, first: int, before: int) -> Iterator[Record]:
    """One attempt's records from one ``seq`` to before another: what a client has lost when it was ended."""
    if first < before:
        for record in read_records(folder / RECORDS_FILE):
            if record["attempt"] == attempt and first <= record["seq"] < before:
                yield record


def run_start(folder: Path) -> Record:
    """How the run began; empty where the record does not say."""
    return next(records_of(folder / RECORDS_FILE, "run_start"), {})
