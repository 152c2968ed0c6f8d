"""The full checks before a training."""

from __future__ import annotations

from collections.abc import Callable

from .subject import Finding, Subject

TRIALS: dict[str, Callable[[Subject], Finding]] = {}
