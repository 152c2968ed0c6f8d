"""What a training shows of itself besides its numbers, and what it warns of, within 1 % of its time."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..contracts import Batch, Clock, Decision, Field, Schema
from ..data.loader import Loader
from ..errors import StorageError
from ..model.freeze import learning
from ..watch.activity import activities, as_numbers
from ..watch.alerts import Alert, Alerts
from ..watch.graph import graph
from ..watch.histograms import histograms
from ..watch.media import Medium
from ..watch.pictures import prediction
from ..watch.recorder import Recorder
from .device import Mover
from .recipe import RunSettings
from .seen import Seen
from .step import Stepper

BUDGET = 0.01
_EXAMPLES = 32
DUES = ("histograms", "pictures")
"""The decisions that say how often something is done."""
_BEFORE_PROFILE = 10
_NEVER = 1 << 62
Wanted = int | Literal["auto", "epoch"]


class Watched(Protocol):
    """What is looked at."""

    settings: RunSettings
    clock: Clock
    stepper: Stepper
    steps_per_epoch: int
    valid: Loader | None
    example: Batch
    mover: Mover

    @property
    def is_own_step(self) -> bool: ...

    @property
    def schema(self) -> Schema: ...

    @property
    def chance_loss(self) -> float | None: ...

    def forward(self, batch: Batch) -> Any: ...


class Due:
    """When something expensive is done next. Its period in steps is set once, by what the first time has cost."""

    def __init__(self, name: str, override: str, wanted: Wanted, epoch_steps: int, period: int | None):
        self.name, self._override, self._epoch_steps = name, override, epoch_steps
        self.period = wanted if isinstance(wanted, int) else epoch_steps if wanted == "epoch" else period
        self._next = 0

    def goes_on_from(self, step: int) -> None:
        period = self.period or self._epoch_steps
        self._next = (step // period + 1) * period

    def is_due(self, step: int) -> bool:
        return step >= self._next

    def give_up(self) -> None:
        self._next = _NEVER

    def done(self, step: int, cost_s: float, step_s: float) -> Decision | None:
        """Note when it is due again; the decision where its period has just been set."""
        made = None
        if self.period is None:
            affordable = cost_s / (BUDGET * step_s) if step_s else 0
            epochs = max(1, math.ceil(affordable / self._epoch_steps))
            self.period = epochs * self._epoch_steps
            reason = f"one round takes {cost_s * 1e3:.3g} ms, and {BUDGET:.0%} of the time is for it"
            made = Decision(self.name, self.period, f"steps between two; {reason}", self._override)
        self.goes_on_from(step)
        return made


class Watching:
    """Looks at a training from its loop. Nothing of the model, of its gradients or of random state is changed."""

    def __init__(self, watched: Watched, recorder: Recorder, say: Callable[[str], None], periods: dict[str, int]):
        chosen = self._chosen = watched.settings.monitor
        self._watched, self._recorder, self._say = watched, recorder, say
        self.alerts = Alerts()
        steps = watched.steps_per_epoch
        wanted: Wanted = "auto" if chosen.histograms == "off" else chosen.histograms
        self._histograms = Due("histograms", "monitor.histograms", wanted, steps, periods.get("histograms"))
        self._pictures = Due("pictures", "monitor.images", "auto", steps, periods.get("pictures"))
        self._pictured: Tensor | None = None
        self._profile: Any = None
        self._first_profiled = self._last_profiled = 0
        self.next_step = _NEVER

    def begin(self, is_new: bool) -> None:
        """Show the graph of a new run, and find out when the rest is due."""
        step = self._watched.clock.step
        self._histograms.goes_on_from(step)
        self._pictures.goes_on_from(step)
        if is_new and self._chosen.graph:
            model = self._watched.stepper.model
            example = self._example(2)
            self._log("graph", tag="model", late=graph(model, lambda: self._watched.forward(example)))
        if is_new and self._chosen.profile:
            self._last_profiled = step + _BEFORE_PROFILE + self._chosen.profile
            self.next_step = step + _BEFORE_PROFILE
        else:
            self._wait_for_step()

    def _wait_for_step(self) -> None:
        by_steps = isinstance(self._chosen.histograms, int)
        self.next_step = self._histograms._next if by_steps else _NEVER

    def at_step(self, step_s: float) -> None:
        """To be called once ``next_step`` is reached."""
        step = self._watched.clock.step
        if step < self._last_profiled:
            self._profile, self._first_profiled = torch.profiler.profile(), step + 1
            self._profile.start()
            self.next_step = self._last_profiled
            return
        self.end()
        if isinstance(self._chosen.histograms, int) and self._histograms.is_due(step):
            self._log_histograms(step_s)
        self._wait_for_step()

    def end(self) -> None:
        """Record the trace that is under way, however few steps it has seen."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
            steps = {"first_step": self._first_profiled, "last_step": self._watched.clock.step}
            self._log("profile", late=Medium(_trace(profile), ".json", steps))

    # --- pictures

    def gatherer(self) -> Seen | None:
        """What gathers at the evaluation that comes now, where something of it is to be shown."""
        most, valid = self._chosen.images, self._watched.valid
        if not most or valid is None or not self._pictures.is_due(self._watched.clock.step):
            return None
        try:
            stride = max(1, len(valid.dataset) // most)  # from all of the split: its files lie by class
        except TypeError:  # a stream
            stride = 1
        return Seen(most, self._picture_key(), stride)

    def show_seen(self, seen: Seen, split: str, step_s: float) -> None:
        """Record what an evaluation has gathered."""
        with self._within(self._pictures, step_s):
            classes = self._classes()
            counts = seen.confusion()
            if counts is not None:
                names = [*classes, *map(str, range(len(classes), len(counts)))][: len(counts)]
                self._log("confusion", tag=f"{split}/confusion", classes=names, counts=counts)
            curves = seen.curves()
            for number, curve in enumerate(curves[1:] if len(curves) == 2 else curves, start=len(curves) == 2):
                name = classes[number] if number < len(classes) else str(number)
                self._log("pr_curve", tag=f"{split}/pr_curve/{name}", **curve)
            if seen.held:
                late = prediction(
                    self._shown(seen), seen.held["truth"], seen.held["output"], classes=classes,
                    ids=seen.held["index"].tolist(), most=seen.most,
                )  # fmt: skip
                self._log("prediction", tag=f"{split}/prediction", late=late)

    def _classes(self) -> tuple[str, ...]:
        schema = self._watched.schema
        return next((schema[name].classes for name in schema.targets if schema[name].classes), ())

    def _picture_key(self) -> str | None:
        schema = self._watched.schema
        keys = [name for name in schema.inputs if _is_picture(schema[name])]
        return keys[0] if len(keys) == 1 else None

    def _shown(self, seen: Seen) -> Any:
        """The pictures that were evaluated, as they were read; None where the samples are no pictures."""
        key, valid = self._picture_key(), self._watched.valid
        if key is None or "shown" in seen.held:
            return seen.held.get("shown")
        if self._pictured is None and valid is not None:  # features were evaluated: what they are of is read once
            with suppress(Exception):  # a sample that cannot be read, or is of another size
                self._pictured = torch.stack([valid.dataset[i][key] for i in seen.held["index"].tolist()])
        return self._pictured

    # --- histograms

    def after_epoch(self, history: list[dict[str, Any]], step_s: float) -> None:
        """Histograms where they are due, and what the metrics warn of."""
        if self._chosen.histograms in ("auto", "epoch") and self._histograms.is_due(self._watched.clock.step):
            self._log_histograms(step_s)
        self._raise(self.alerts.after_epoch(history, self._watched.chance_loss))

    def _log_histograms(self, step_s: float) -> None:
        with self._within(self._histograms, step_s):
            model = self._watched.stepper.model
            named = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
            named |= {f"gradients/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
            for tag, late in histograms(named).items():
                self._log("histogram", tag=tag, late=late)
            if self._watched.is_own_step:
                return
            example = self._example(_EXAMPLES)
            found = activities(model, lambda: self._watched.forward(example))
            for name, activity in found.items():
                self._log("histogram", tag=f"activations/{name}", late=activity.histogram)
            dead = as_numbers({name: activity.dead_fraction for name, activity in found.items()})
            self._raise(self.alerts.dead(dead))

    def _example(self, most: int) -> Batch:
        return self._watched.mover({name: _few(value, most) for name, value in self._watched.example.items()})

    # --- alerts

    def read(self, values: dict[str, float]) -> None:
        """What a log point warns of."""
        self._raise(self.alerts.after_reading(values, self._watched.clock.step))

    def fed(self, waiting_fraction: float | None) -> None:
        """What the time that was spent waiting for data warns of, and the space that is left."""
        if waiting_fraction is not None:
            self._raise(self.alerts.feeding(waiting_fraction))
        parameters = sum(p.numel() * p.element_size() for p in self._watched.stepper.model.parameters())
        moments = 2 * sum(p.numel() * p.element_size() for p in learning(self._watched.stepper.model))
        try:
            free = shutil.disk_usage(self._recorder.path.parent).free
        except OSError:
            return
        self._raise(self.alerts.space(free, parameters + moments))

    def _raise(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            at = self._watched.clock.state_dict()
            self._recorder.alert(alert.name, alert.text, level=alert.level, fix=alert.fix, at=at)

    # --- the record

    @contextmanager
    def _within(self, due: Due, step_s: float) -> Iterator[None]:
        """Do something expensive that is due, and set its period if this was the first time.

        Where it fails, whatever the reason, an alert says so and it is left out from then on: the training goes on.
        """
        began, step = time.perf_counter(), self._watched.clock.step
        try:
            yield
        except Exception as error:
            text = f"{due.name} cannot be shown and are left out: {type(error).__name__}: {error}"
            self._raise([Alert(due.name, "warning", text, "")])
            due.give_up()
            return
        if due.period is None:  # what the writer's thread does with it takes its time from the training too
            with suppress(StorageError):
                self._recorder.flush()
        made = due.done(step, time.perf_counter() - began, step_s)
        if made is not None:
            self._log("decision", **vars(made))
            self._say(f"{made.name}  each {made.value:,} steps: {made.reason.partition('; ')[2]} ({made.override})")

    def _log(self, kind: str, **payload: Any) -> None:
        self._recorder.log(kind, **self._watched.clock.state_dict(), **payload)


def _is_picture(field: Field) -> bool:
    shape = field.shape or ()
    return field.kind == "image" or (field.kind in ("tensor", "vector") and len(shape) == 3 and shape[0] in (1, 3, 4))


def _few(value: Any, most: int) -> Any:
    if isinstance(value, dict):
        return {name: _few(item, most) for name, item in value.items()}
    return value[:most] if isinstance(value, Tensor | list | tuple) else value


def _trace(profile: Any) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trace.json"
        profile.export_chrome_trace(str(path))
        return path.read_bytes()
