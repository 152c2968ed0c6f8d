"""Writes the record: the trainer's thread only queues, one daemon thread writes, and each view has a thread besides."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..files import AppendFile
from .feeds import Callback, Feed, View
from .media import MediaStore
from .records import Record, dump_record

_DRAIN_S = 0.1
LATE = "late"
"""The key of a payload that is finished on the writer's thread."""


class Recorder:
    """Writes the record of one attempt and feeds it to the views.

    ``on_record`` is called on a thread of its own; ``on_alert(text)`` on whichever meets the trouble. A view that
    fails is said, fed again later, and never stops the training.
    """

    def __init__(
        self, path: Path, *, attempt: int, views: Sequence[View] = (),
        on_record: Sequence[Callable[[Record], Any]] = (), on_alert: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.path = path
        self.attempt = attempt
        self.media = MediaStore(path.parent)
        self._on_alert = on_alert
        self._file = AppendFile(path)
        self._seq = 0
        self._queue: deque[tuple[str, int, int, int, float, dict[str, Any]]] = deque()
        self._unwritten: list[bytes] = []
        self._last = (0, 0, 0)
        self._is_refused = False
        self._writing = threading.Lock()
        self._idle = False
        self._closing = False
        self._closed = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        start = path.stat().st_size
        self._feeds = [
            Feed(view, path, self.media, attempt, start, whole, self._view_failed)
            for view, whole in [*((view, True) for view in views), *((Callback(call), False) for call in on_record)]
        ]
        self._thread = threading.Thread(target=self._run, name="torchkeep-records", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def view_errors(self) -> int:
        """How often a view has failed."""
        return sum(feed.errors for feed in self._feeds)

    def log(self, kind: str, *, step: int, samples: int, epoch: int, **payload: Any) -> None:
        """Queue one record: no file is touched, nothing blocks or raises. The payload must not be changed later.

        What stands under "late" is a payload that is finished on the writer's thread (``media.Late``).
        """
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
        """Make the record durable, feed the views to the end and close them, each within its time.

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
            for feed in self._feeds:
                feed.close()
            self._file.close()

    def alert(
        self, name: str, text: str, *, level: str = "warning", fix: str = "", at: dict[str, int] | None = None
    ) -> None:
        """Record a warning where the run stands (``at``: step, samples, epoch), and say it."""
        at = at or dict(zip(("step", "samples", "epoch"), self._last, strict=True))
        self.log("alert", **at, name=name, level=level, text=text, fix=fix)
        if self._on_alert is not None:
            self._on_alert(text + (f" ({fix})" if fix else ""))

    def _view_failed(self, name: str, text: str) -> None:
        self.alert(f"view {name}", text)

    def _run(self) -> None:
        """The writer's thread: sleeps without a timer while nothing is logged."""
        while not self._closing:
            # idle is raised before the queue is looked at, and log looks at idle after it appended: none is missed
            self._idle = True
            if not self._queue and not self._unwritten:
                self._wake.wait()
            self._wake.clear()
            self._idle = False
            self._hurry.wait(_DRAIN_S)
            self._drain()

    def _drain(self) -> None:
        try:
            with self._writing:
                self._write_queued()
            self._is_refused = False
        except StorageError as error:
            # the lines are kept: flush meets the same refusal and raises it where the trainer can act
            if not self._is_refused:
                self._is_refused = True
                self.alert("record", f"the record is kept in memory for now: {error.what} ({error.got})", level="error")
            self._hurry.wait(1)

    def _write_queued(self) -> None:
        """Append all that is queued in one write. Call with ``_writing`` held."""
        while self._queue:
            kind, step, samples, epoch, time_s, payload = self._queue[0]
            late = payload.get(LATE)
            if late is not None:
                kind, payload = self._settled(kind, late, payload)
            self._queue.popleft()  # not before: where the disk refuses a medium, the record waits for it
            self._unwritten.append(dump_record(self._numbered(kind, step, samples, epoch, time_s, payload)))
        if not self._unwritten:
            return
        self._file.append(b"".join(self._unwritten))
        self._unwritten.clear()
        for feed in self._feeds:
            feed.wake()

    def _settled(self, kind: str, late: Any, payload: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        try:
            return kind, {key: value for key, value in payload.items() if key != LATE} | late.settle(self.media)
        except StorageError:
            raise
        except Exception as error:
            text = f"{kind} {payload.get('tag', '')!r} could not be drawn: {type(error).__name__}: {error}"
            return "alert", {"name": f"kind {kind}", "level": "error", "text": text, "fix": ""}

    def _numbered(
        self, kind: str, step: int, samples: int, epoch: int, time_s: float, payload: dict[str, Any]
    ) -> Record:
        head = {"kind": kind, "attempt": self.attempt, "rank": 0, "seq": self._seq}
        self._seq += 1
        self._last = step, samples, epoch
        return {**head, "step": step, "samples": samples, "epoch": epoch, "time": time_s, **payload}
