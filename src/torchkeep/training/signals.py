"""Ctrl-C and SIGTERM: what the system asks of a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..errors import Interrupted, PreemptedError


class Signals:
    """Ctrl-C and SIGTERM ask for an end at the next step; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    @contextlib.contextmanager
    def at_once(self, what: str, go_on: str) -> Iterator[None]:
        """For work after the last save: a signal ends it where it is, ``what`` being said of it.

        Raises:  Interrupted or PreemptedError
        """
        self._at_once = (what, go_on)
        with self:
            yield
        self._at_once = None

    _at_once: tuple[str, str] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._at_once is not None:
            what, go_on = self._at_once
            if number == signal.SIGTERM:
                raise PreemptedError(f"preempted {what}", fix=go_on)
            raise Interrupted(f"interrupted {what}", fix=go_on)
        if self.asked == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
