"""What a person should look at, found in numbers that are there anyway."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_EXPLODED = 100.0  # times the median of the norms before: spikes of healthy runs stay below
_HUGE_NORM = 1e6
_NOT_FINITE = 2  # readings: a loss scaler of fp16 finds its scale by one that is not, and skips its step
_VANISHED = 1e-7  # of the first norm, while the loss is still high
_NOTHING = 1e-9  # a norm that moves no parameter of usual size in fp32
_ENOUGH = 20
_KEPT = 200
_STILL_HIGH = 0.9  # of the first loss: gradients that are small at a small loss have done their work
_SMALL_LOSS = 1e-3
_CHANCE = 0.98  # of ln K: a model that has learned anything in an epoch is below
_TRIED_STEPS = 100
_RISES = 3
_RISEN = 0.05  # of the loss from which it rises: less does no harm yet
_NOISE = 3.0  # times the bends of the curve: by chance alone one of 24 evaluations is the third rise in a row
_RECENT = 20
_WAITING = 0.2
_WINDOWS = 5
_WELL = 3  # times that something must be well until it is said again: what flickers is one thing
_LEAST_BYTES = 1 << 30
_DEAD = 0.5


@dataclass(frozen=True)
class Alert:
    """One thing to look at, with what may help."""

    name: str
    level: str
    text: str
    fix: str


class Alerts:
    """Says each thing once, and again only after it has been well meanwhile."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}
        self._norms: deque[float] = deque(maxlen=_KEPT)
        self._not_finite = 0
        self._first_norm: float | None = None
        self._first_loss: float | None = None
        self._waits: deque[float] = deque(maxlen=_WINDOWS)

    def after_reading(self, values: Mapping[str, float], step: int) -> list[Alert]:
        """What the numbers of a log point say: "train/loss", "train/gradient_norm"."""
        loss, norm = values.get("train/loss"), values.get("train/gradient_norm")
        if self._first_loss is None and loss is not None:
            self._first_loss = loss
        if norm is None:
            return []
        self._not_finite = 0 if math.isfinite(norm) else self._not_finite + 1
        usual = statistics.median(self._norms) if len(self._norms) >= _ENOUGH else None
        found = [
            self._say(
                "gradients explode", self._has_exploded(norm, usual),
                f"the gradients' norm is {norm:.3g} at step {step}" + (f", usually {usual:.3g}" if usual else ""),
                "train.clip_norm=1.0, or a lower optimizer.learning_rate",
            ),
            self._say(
                "gradients vanish", self._has_vanished(norm, loss),
                f"the gradients' norm is {norm:.3g} at step {step} while the loss is {loss or 0:.3g}",
                "a look at the activations' histograms; normalisation, another initialisation or activation",
            ),
        ]  # fmt: skip
        if math.isfinite(norm):
            self._norms.append(norm)
            self._first_norm = norm if self._first_norm is None else self._first_norm
        return [alert for alert in found if alert]

    def _has_exploded(self, norm: float, usual: float | None) -> bool:
        if not math.isfinite(norm):
            return self._not_finite >= _NOT_FINITE
        return norm > _HUGE_NORM or (usual is not None and norm > _EXPLODED * usual > 0)

    def _has_vanished(self, norm: float, loss: float | None) -> bool:
        if self._first_norm is None or self._first_loss is None or loss is None or len(self._norms) < 3:
            return False
        recent = statistics.median([*list(self._norms)[-2:], norm])
        is_small = recent < max(_NOTHING, _VANISHED * self._first_norm)
        return is_small and loss > max(_SMALL_LOSS, _STILL_HIGH * self._first_loss)

    def after_epoch(self, history: Sequence[Mapping[str, Any]], chance_loss: float | None) -> list[Alert]:
        """What the epochs so far say: rows with "metrics", and the loss of guessing where it is known."""
        train = [row["metrics"].get("train/loss", math.nan) for row in history]
        valid = [row["metrics"]["valid/loss"] for row in history if "valid/loss" in row["metrics"]]
        has_tried = bool(history) and history[-1]["step"] >= _TRIED_STEPS
        stays = chance_loss is not None and has_tried and train[-1] >= _CHANCE * chance_loss
        leaves = _rises(valid[-_RECENT:]) and train[-1] < train[-_RISES - 1]
        found = [
            self._say(
                "loss at chance", stays,
                f"after {len(history)} epochs the training loss is {train[-1] if train else 0:.3g}, and guessing gives "
                f"{chance_loss or 0:.3g}",
                "torchkeep survey looks at the labels; a higher or lower optimizer.learning_rate",
            ),
            self._say(
                "validation leaves training", leaves,
                f"the validation loss has risen for {_RISES} evaluations while the training loss fell",
                "early_stopping.patience, more data.augment or optimizer.weight_decay; the best checkpoint is kept",
            ),
        ]  # fmt: skip
        return [alert for alert in found if alert]

    def feeding(self, waiting_fraction: float) -> list[Alert]:
        """What the share of time that was spent waiting for data says."""
        self._waits.append(waiting_fraction)
        mean = statistics.fmean(self._waits)
        is_bound = len(self._waits) == _WINDOWS and mean > _WAITING
        text = f"{mean:.0%} of the time is spent waiting for data"
        return self._told("steps wait for data", is_bound, text, 'data.workers, or data.cache = "ram" for images')

    def space(self, free_bytes: int, needed_bytes: int) -> list[Alert]:
        """What the space that is left on the disk says; ``needed_bytes`` is about the next checkpoint's size."""
        is_short = free_bytes < max(_LEAST_BYTES, 2 * needed_bytes)
        text = f"the disk has {free_bytes / 1e9:.2f} GB left, and a checkpoint takes {needed_bytes / 1e9:.2f}"
        return self._told("disk fills", is_short, text, "free some space, or a smaller checkpoint.keep_last")

    def dead(self, fractions: Mapping[str, float]) -> list[Alert]:
        """What the share of each layer's units that never answer says."""
        worst = {name: part for name, part in fractions.items() if part > _DEAD}
        names = ", ".join(f"{name} {part:.0%}" for name, part in sorted(worst.items(), key=lambda row: -row[1])[:5])
        text = f"units answer no sample of a batch: {names}"
        return self._told(
            "dead units", bool(worst), text, "a lower optimizer.learning_rate, a warm-up or normalisation"
        )

    def _told(self, name: str, is_so: bool, text: str, fix: str) -> list[Alert]:
        alert = self._say(name, is_so, text, fix)
        return [alert] if alert else []

    def _say(self, name: str, is_so: bool, text: str, fix: str) -> Alert | None:
        if not is_so:
            if name in self._said:
                self._said[name] += 1
                if self._said[name] >= _WELL:
                    del self._said[name]
            return None
        is_new = name not in self._said
        self._said[name] = 0
        return Alert(name, "warning", text, fix) if is_new else None


def _rises(losses: list[float]) -> bool:
    """Whether the last evaluations each were worse, by more than the noise of the curve."""
    last = losses[-_RISES - 1 :]
    if len(last) <= _RISES or not all(a < b for a, b in pairwise(last)):
        return False
    slopes = [b - a for a, b in pairwise(losses)]
    bend = statistics.median(abs(b - a) for a, b in pairwise(slopes))
    return last[-1] - last[0] > max(_RISEN * abs(last[0]), _NOISE * bend)
