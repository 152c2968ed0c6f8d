"""When cyclic garbage is collected: by time, between steps, and only what the training has made."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

_EVERY_S = 0.05  # or each step, where one takes longer: a cycle that holds activations lives no longer than that
_WHOLE_EVERY = 100


@contextlib.contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Have the collector look at new objects only: a million older ones, of imports, take it 0.1 s a time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Collector:
    """Stands in for the collector's own clock, which counts objects: a step makes some hundreds, for all to be visited.

    ``collect`` is to be called once ``next_s`` (of ``time.perf_counter``) has come.
    """

    def __init__(self) -> None:
        self.next_s = 0.0
        self._times = 0
        self._was_on = False

    def __enter__(self) -> Collector:
        self._was_on = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        if self._was_on:
            gc.enable()

    def collect(self) -> None:
        self._times += 1
        if self._was_on:
            gc.collect(2 if self._times % _WHOLE_EVERY == 0 else 1)
        self.next_s = time.perf_counter() + _EVERY_S
