"""Early stopping: when no evaluation was better for a while."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field as Setting

from ..settings import Settings

Mode = Literal["min", "max"]


class EarlyStoppingSettings(Settings):
    """[early_stopping]: off unless ``patience`` is set."""

    patience: int | None = Setting(default=None, gt=0)
    """Evaluations without a better value until the training ends; none: never."""
    metric: str | None = None
    """The value that is watched; none: the one that picks the best checkpoint."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more is better; "auto" knows it from the name."""
    min_delta: float = Setting(default=0.0, ge=0.0)
    """A change smaller than this is no improvement."""
    warmup: int = Setting(default=0, ge=0)
    """Evaluations at the beginning after which patience is counted."""
    restore_best: bool = False
    """Whether the model ends with the parameters of the best checkpoint, however the training ended."""


def better_mode(metric: str) -> Mode:
    """Whether less or more of a metric is better, from its name: losses and errors should fall."""
    return "min" if metric.endswith(("loss", "error", "perplexity")) else "max"


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether ``value`` improves on ``best``. NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


class EarlyStopping:
    """Counts evaluations without improvement; alone in a hand-written loop:

    >>> stopper = EarlyStopping(metric="valid/loss", mode="min", patience=5)
    >>> stopper.update({"valid/loss": 0.4})   # True once it is time to stop
    False
    """

    def __init__(
        self, metric: str = "valid/loss", mode: Mode | None = None, patience: int = 5, min_delta: float = 0.0,
        warmup: int = 0,
    ):  # fmt: skip
        self.metric = metric
        self.mode: Mode = mode or better_mode(metric)
        self.patience = patience
        self.min_delta, self.warmup = min_delta, warmup
        self.best: float | None = None
        self.waited = self.seen = 0

    @property
    def should_stop(self) -> bool:
        return self.waited >= self.patience

    def update(self, metrics: dict[str, float]) -> bool:
        """Look at one evaluation; whether it is time to stop. A missing metric counts as no improvement."""
        value = metrics.get(self.metric, math.nan)
        self.seen += 1
        if is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.waited = value, 0
        elif self.seen > self.warmup:
            self.waited += 1
        return self.should_stop

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.seen = state["best"], state["waited"], state.get("seen", 0)
