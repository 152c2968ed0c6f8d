"""What feeds the views: each on a thread of its own, from its own place in the record's file.

The file is the queue: a view that is slow or dead holds no memory and no other view, never the training, and catches
up from where it stood.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import StorageError
from .media import MediaStore
from .records import Record, kept_records, lines_from

_BATCH_RECORDS = 1000
_BATCH_BYTES = 1 << 20
_PAUSES_S = (1, 2, 4, 8, 16, 32, 60)
_TRIES_AT_THE_END = 3
_MOST_LEFT_OUT = 100  # a view that takes nothing at all costs the training time with every record
_CLOSE_S = 30.0


class Unreachable(OSError):  # noqa: N818 - it says what the place is
    """Where a view sends to does not answer now: what it was given is given again later."""


class View(Protocol):
    """Somewhere that shows the record.

    ``write`` may be given records once more, after a resume all earlier ones: it shows nothing twice. It raises
    Unreachable (or another OSError, StorageError) where the same records are to be given again later; with any other
    error the record that caused it is left out. A run waits for its views at most ``close_timeout_s`` at its end.
    """

    name: str
    close_timeout_s: float

    def write(self, records: list[Record], media: MediaStore) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """End at once, from another thread: it has not closed within its time."""


class Callback:
    """A callable that is given each record of this attempt, as a view."""

    close_timeout_s = _CLOSE_S

    def __init__(self, call: Callable[[Record], Any]):
        self.name = getattr(call, "__qualname__", type(call).__name__)
        self._call = call
        self._seq = -1

    def write(self, records: list[Record], media: MediaStore) -> None:
        for record in records:
            if record["seq"] > self._seq:
                self._seq = record["seq"]  # before the call: one that fails is left out, not asked for again
                self._call(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class Feed:
    """Gives a view what is in the record from ``start`` on, in order; with ``whole`` the earlier attempts first.

    ``on_alert(name, text)`` is told of a view's first failure, of its return, and of what it has not taken at the end.
    """

    def __init__(
        self, view: View, path: Path, media: MediaStore, attempt: int, start: int, whole: bool,
        on_alert: Callable[[str, str], None],
    ):  # fmt: skip
        self.view = view
        self.errors = 0
        self._path, self._media, self._attempt, self._place = path, media, attempt, start
        self._earlier = whole and attempt > 0
        self._on_alert = on_alert
        self._is_down = False
        self._tries = self._left_out = 0
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"torchkeep-{view.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is more in the file."""
        if not self._is_down:
            self._wake.set()

    def close(self) -> None:
        """Give the view the rest and close it, within its time."""
        self._closing = True
        self._wake.set()
        self._thread.join(self.view.close_timeout_s)
        if self._thread.is_alive():
            self._alert(f"{self.view.name} did not end within {self.view.close_timeout_s:g} s and is left behind")
            self.view.abandon()

    def _run(self) -> None:
        while not self._closing and self._left_out < _MOST_LEFT_OUT:
            self._wake.wait(_PAUSES_S[min(self._tries, len(_PAUSES_S)) - 1] if self._tries else None)
            self._wake.clear()
            self._deliver_all()
        if self._left_out >= _MOST_LEFT_OUT:
            self._alert(f"{self.view.name} takes none of {_MOST_LEFT_OUT} records and is given up")
        for _ in range(_TRIES_AT_THE_END):
            if self._deliver_all():
                break
            time.sleep(1)
        else:
            self._alert(f"{self.view.name} has not taken all of the record: torchkeep sync sends the rest later")
        with contextlib.suppress(Exception):
            self.view.flush()
        try:
            self.view.close()
        except Exception as error:
            self._failed(error)

    def _deliver_all(self) -> bool:
        """Give what there is; whether all was taken."""
        try:
            for records, place in self._batches():
                if self._left_out >= _MOST_LEFT_OUT:
                    return True
                if not self._deliver(records):
                    return False
                self._place = place
        except Exception as error:  # the record itself cannot be read: no view can be fed from it
            self._failed(error)
            return False
        return True

    def _batches(self) -> Iterator[tuple[list[Record], int]]:
        """Records with the place in the file behind them. Earlier attempts leave the place where it is."""
        if self._earlier and self._path.stat().st_size > self._place:  # this attempt has said where it goes on from
            batch: list[Record] = []
            for record in kept_records(self._path):
                if record["attempt"] == self._attempt:
                    break
                batch.append(record)
                if len(batch) == _BATCH_RECORDS:
                    yield batch, self._place
                    batch = []
            yield batch, self._place
            self._earlier = False
        if not self._earlier:
            yield from lines_from(self._path, self._place, _BATCH_RECORDS, _BATCH_BYTES)

    def _deliver(self, records: list[Record]) -> bool:
        if not records:
            return True
        try:
            self.view.write(records, self._media)
        except (OSError, StorageError) as error:
            self._failed(error)
            self._tries += 1
            self._is_down = True
            return False
        except Exception as error:
            if len(records) > 1:
                return all(self._left_out >= _MOST_LEFT_OUT or self._deliver([record]) for record in records)
            self._left_out += 1
            self._failed(error)
            return True
        self._left_out = 0
        if self._is_down:
            self._is_down, self._tries = False, 0
            self._alert(f"{self.view.name} is back")
        return True

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if self.errors == 1 or not self._is_down:
            text = f"{type(error).__name__}: {error}"
            if self.errors <= 3:
                self._alert(f"{self.view.name} failed and the training goes on: {text}")

    def _alert(self, text: str) -> None:
        with contextlib.suppress(Exception):  # nobody is left to tell
            self._on_alert(self.view.name, text)
