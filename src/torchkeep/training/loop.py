"""The training: epochs of steps, log points, evaluations and checkpoints, from any saved moment on."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..contracts import INDEX, Batch, Clock, Json
from ..data.loader import FeedStats, Loader
from ..errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    CheckpointError,
    Interrupted,
    LabelError,
    NonFiniteLossError,
    PreemptedError,
    RunFailedError,
    TorchkeepError,
)
from ..keep.checkpoint import Checkpoints
from ..keep.generators import generator_states, set_generator_states
from ..keep.stopping import EarlyStopping, is_better
from ..model.freeze import FreezePlan, begin_training
from ..watch.console import Console
from ..watch.recorder import Recorder
from ..watch.trainable import show_trainable
from .collecting import Collector, old_objects_left_alone
from .contract import check_contract, refuse_misfit
from .evaluate import Evaluation
from .metrics import Adapted, Metric
from .optim import Average
from .prefix import GAIN, Prefix
from .recipe import RunSettings
from .signals import Signals
from .step import Stepper
from .watching import Watching
from .window import LogPoint, Window, samples_text

_TICK_S = 0.25  # between two looks at the bar and the clock on the wall
_RATE_EVERY_S = 2.0
_SHORT_EPOCH_S = 10.0
_READ_EVERY = 50  # steps: with denser log points the numbers of many are read together


@dataclass
class Best:
    """The best evaluation so far."""

    step: int = 0
    epoch: int = 0
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class _StopReached(Exception):  # noqa: N818 - nothing went wrong
    """A replay is where it should end."""


class Parts(Protocol):
    """What ``prepare`` has made for a training."""

    settings: RunSettings
    clock: Clock
    stepper: Stepper
    evaluation: Evaluation
    loader: Loader
    valid: Loader | None
    total_steps: int
    steps_per_epoch: int
    log_every: int
    best_metric: str | None
    stopper: EarlyStopping | None
    average: Average | None
    plan: FreezePlan | None
    prefix: Prefix | None

    def loaders_at(self, epoch: int) -> tuple[Loader, Loader | None]: ...

    def trainable(self) -> Json: ...

    contract: Json
    train_metrics: list[Metric | Adapted]
    objects: dict[str, Any]


class Training:
    """One run under way. Its state is all that decides its further course."""

    def __init__(
        self, parts: Parts, checkpoints: Checkpoints, recorder: Recorder, console: Console, signals: Signals,
        go_on: str, watching: Watching | None = None,
    ):  # fmt: skip
        settings = self.settings = parts.settings
        self.clock, self.stepper, self.evaluation = parts.clock, parts.stepper, parts.evaluation
        self.loader, self.valid, self.log_every = parts.loader, parts.valid, parts.log_every
        self.total_steps, self.steps_per_epoch = parts.total_steps, parts.steps_per_epoch
        self.best_metric, self.stopper, self.average = parts.best_metric, parts.stopper, parts.average
        self.train_metrics, self.objects, self.plan = parts.train_metrics, parts.objects, parts.plan
        self.checkpoints, self.recorder = checkpoints, recorder
        self.console, self.signals, self.go_on, self.watching = console, signals, go_on, watching
        self._contract = parts.contract
        self._loaders_at, self._prefix, self._trainable = parts.loaders_at, parts.prefix, parts.trainable
        self._choose_loaders()
        self.best = Best()
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.window = Window()
        self._epoch_loss, self._epoch_samples = 0.0, 0
        self._watch_every = self.log_every * -(-_READ_EVERY // self.log_every)
        self._plan_log_points()
        self._last_indices: list[Tensor] = []
        self._tags: dict[str, str] = {}
        self._collector = Collector()
        self._trained_s, self._trained_samples, self._trained_steps = 0.0, 0, 0
        every = settings.checkpoint.every
        self._save_steps = every if isinstance(every, int) else None
        self._save_period_s = settings.checkpoint.period_s()
        self._last_save = self._next_tick = self._rate_since = time.perf_counter()
        self._rate_samples, self._rate = 0, 0.0
        self._fed = FeedStats()
        self._num_bad = 0

    @property
    def rate(self) -> float:
        """Samples trained on a second, evaluation and saving left out."""
        return self._trained_samples / self._trained_s if self._trained_s else 0.0

    @property
    def trained_s(self) -> float:
        return self._trained_s

    def run(self) -> str:
        """Train to the end; why it ended: "finished" or "stopped early".

        Raises:  Interrupted or PreemptedError after saving, NonFiniteLossError without
        """
        epochs = self.settings.train.epochs
        self.console.start(self.total_steps, self.clock.step, self.steps_per_epoch, epochs)
        begin_training(self.stepper.model)
        if self.plan is not None:
            self.plan.check()
            self._show_trainable(is_new=self._last_saved_step < 0)
        if self.watching is not None:
            self.watching.begin(is_new=self._last_saved_step < 0)
        with self.signals, old_objects_left_alone():
            try:
                self._run_epochs()
            except Exception as error:
                with contextlib.suppress(TorchkeepError):
                    self.checkpoints.release()  # the best so far is good, whatever came after it
                    self._save_after(error)
                if isinstance(error, TorchkeepError) and error.exit_code == EXIT_BAD_INPUT:
                    error.exit_code = EXIT_FAILED  # what was written by now stands
                raise
            finally:
                if self.watching is not None:
                    self.watching.end()
        return "stopped early" if self._is_stopped else "finished"

    def _run_epochs(self) -> None:
        self.checkpoints.before_visible = lambda: self.recorder.flush(durable=True)
        if self.clock.step == 0:
            self.save()  # a full disk is found now, and a kill before the first save loses nothing
        self.checkpoints.reserve(self.state_dict())
        epochs = self.settings.train.epochs
        while self.clock.epoch < epochs and self.clock.step < self.total_steps and not self._is_stopped:
            started = time.perf_counter()
            self._choose_loaders()
            with self._collector:
                finished = self._epoch()
            elapsed_s = time.perf_counter() - started
            self._measure_gain(elapsed_s)
            self._end_epoch(finished, elapsed_s)
        if self.checkpoints.has_held or self._last_saved_step != self.clock.step:
            self.save()
        self.checkpoints.join()

    def _choose_loaders(self) -> None:
        """Those of the epoch under way: they change where more of the model learns than what was kept was made for."""
        loader, valid = self._loaders_at(self.clock.epoch)
        if loader is not self.loader:
            loader.load_state_dict(self.loader.state_dict())
            self.loader, self.valid = loader, valid

    @property
    def _is_stopped(self) -> bool:
        return self.stopper is not None and self.stopper.should_stop

    def _epoch(self) -> bool:
        """Steps up to the epoch's end, or to the last step; whether the epoch was finished."""
        clock, stepper, window, limit = self.clock, self.stepper, self.window, self.total_steps
        begun, samples, first = time.perf_counter(), clock.samples, clock.step
        last_of_epoch = clock.step + self._steps_left()
        for batches in self._groups():
            self._last_indices = indices = [batch[INDEX] for batch in batches]
            if clock.step + 1 == self._next_watch:
                stepper.is_watched = True
            try:
                result = stepper(batches)
            except Exception as error:
                if isinstance(error, LabelError) and len(indices) == 1:
                    error.where = f"step {clock.step + 1}, {samples_text([indices[0][error.rows]])}"
                said = f"step {clock.step + 1} of epoch {clock.epoch + 1}, {samples_text(indices)}"
                error.add_note(f"in {said}")
                for batch in batches:
                    refuse_misfit(error, self._contract, batch, said)
                raise
            clock.step += 1
            clock.samples += result.samples
            window.add(result, indices)
            now = time.perf_counter()
            if now >= self._next_tick:
                self._tick(now)
            if now >= self._collector.next_s:
                self._collector.collect()
            if clock.step >= self._next_look:
                self._look()
            if clock.step == last_of_epoch:
                continue  # what is due is done at the epoch's end, after the evaluation
            if self.plan is not None:
                self._unfreeze(self.plan)
            self._leave_at_stop()
            if clock.step >= limit:
                break  # the same
            if clock.step >= self._next_log:
                self._log_point(wait=False)
            if self.signals.asked is not None:
                self._leave()
            self.checkpoints.check()
            if self._is_save_due(now):
                self.save(wait=False)
        self._trained_s += time.perf_counter() - begun
        self._trained_samples += clock.samples - samples
        self._trained_steps += clock.step - first
        return clock.step == last_of_epoch

    def _unfreeze(self, plan: FreezePlan) -> None:
        if plan.advance(self.clock.epoch, self.clock.step):
            if self.average is not None:
                self.average.follow()
            self._record("trainable_map", **self._trainable())

    def _show_trainable(self, is_new: bool) -> None:
        payload = self._trainable()
        show_trainable(self.console, payload)
        if is_new:
            self._record("trainable_map", **payload)

    def _measure_gain(self, elapsed_s: float) -> None:
        """Record once how much faster an epoch was of which everything was kept already."""
        prefix, made = self._prefix, self._num_made
        if prefix is None or self._gain is not None or elapsed_s <= 0:
            return
        self._num_made = prefix.train.made
        if self.clock.epoch and made == self._num_made and self.loader.dataset is prefix.train:
            self._gain = prefix.gain(elapsed_s)
            self._record("timing", values={GAIN: self._gain})
            self.console.say(f"frozen part  computed once: the steps of an epoch are {self._gain:,.1f} × as fast")

    _gain: float | None = None
    _num_made = -1

    def _steps_left(self) -> int:
        """Steps of the epoch under way."""
        return -(-self.loader.batches_left // self.settings.train.accumulate)

    def replay_to(self, step: int) -> None:
        """Train from a state that was loaded up to the end of another step, as if for a save, and no further."""
        self._stop_at = step
        begin_training(self.stepper.model)
        with contextlib.suppress(_StopReached):
            self._run_epochs()
        self._read()

    _stop_at = -1

    def _leave_at_stop(self) -> None:
        if self.clock.step == self._stop_at:
            raise _StopReached

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of one update: one, or ``accumulate`` of them."""
        size = self.settings.train.accumulate
        group: list[Batch] = []
        for batch in self.loader:
            group.append(batch)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group

    def _plan_log_points(self) -> None:
        step = self.clock.step
        self._next_log = (step // self.log_every + 1) * self.log_every
        self._next_watch = (step // self._watch_every + 1) * self._watch_every
        self._next_read = step + _READ_EVERY

    def _log_point(self, wait: bool = True) -> None:
        """Close what the steps since the last log point have left. Log points follow steps, never time."""
        self.window.mark(self.clock.state_dict(), self.stepper.optimizers.rates())
        self._next_log = (self.clock.step // self.log_every + 1) * self.log_every
        if self.clock.step >= self._next_watch:
            self._next_watch = (self.clock.step // self._watch_every + 1) * self._watch_every
        if wait or self.clock.step >= self._next_read:
            self._read(wait)

    def _read(self, wait: bool = True) -> None:
        """Record the log points whose numbers have come from the device; ``wait`` for all of them."""
        self._next_read = self.clock.step + _READ_EVERY
        for point in self.window.read(self.clock.step, wait):
            if point.samples:
                self._record_point(point)

    def _record_point(self, point: LogPoint) -> None:
        self._epoch_loss += point.loss_sum
        self._epoch_samples += point.samples
        values = {"train/loss": point.loss_sum / point.samples, **point.rates}
        if point.extras:
            tags = self._tags
            if not all(map(tags.__contains__, point.extras)):
                tags.update({name: f"train/{name}" for name in point.extras})
            values.update(zip(map(tags.__getitem__, point.extras), point.extras.values(), strict=True))
        self.metrics["train/loss"] = values["train/loss"]
        self.recorder.log("scalars", **point.clock, values=values)
        if self.watching is not None:
            self.watching.read(values)

    @property
    def step_s(self) -> float:
        """Seconds a step of this attempt, evaluation and saving left out."""
        return self._trained_s / self._trained_steps if self._trained_steps else 0.0

    @property
    def _next_look(self) -> int:
        return self.watching.next_step if self.watching is not None else self.total_steps + 1

    def _look(self) -> None:
        if self.watching is not None:
            self.watching.at_step(self.step_s)

    def _record(self, kind: str, **payload: Any) -> None:
        self.recorder.log(kind, **self.clock.state_dict(), **payload)

    def _tick(self, now: float) -> None:
        self._next_tick = now + _TICK_S
        self._read(wait=False)
        passed = now - self._rate_since
        if passed >= _RATE_EVERY_S or not self._rate:
            self._rate = (self.clock.samples - self._rate_samples) / passed if self._rate_samples else 0.0
            self._rate_since, self._rate_samples = now, self.clock.samples
            if self._rate:
                fed, before = replace(self.loader.stats), self._fed
                self._fed = fed
                values = {"train/samples_per_s": round(self._rate, 1), **fed.since(before, passed)}
                self._record("timing", values={**values, "train/device_waits": self.window.num_waits})
                if self.watching is not None:
                    self.watching.fed(values.get("loader/waiting_fraction"))
        self.console.progress(self.clock.step, self.clock.epoch, self._rate, self.metrics)

    def _is_save_due(self, now: float) -> bool:
        if self._save_steps is not None:
            return self.clock.step % self._save_steps == 0
        # a save by time waits for the one under way by being taken later, one by steps is taken at its step
        is_time = self._save_period_s is not None and now - self._last_save >= self._save_period_s
        return is_time and not self.checkpoints.is_busy

    def _end_epoch(self, finished: bool, elapsed_s: float) -> None:
        """Evaluate, then let schedule, stopper and best know, then save: one state, of one step."""
        if self.plan is not None:
            self.plan.check()
        if finished:
            self.clock.epoch += 1
            if self.average is not None and self.settings.train.swa and self.clock.epoch >= self.settings.train.swa:
                self.average.update()
        self._log_point()
        mean = self._epoch_loss / self._epoch_samples if self._epoch_samples else math.nan
        self._epoch_loss, self._epoch_samples = 0.0, 0
        measured = {"train/loss": mean, **self._read_train_metrics()}
        self._say_bad()
        if self.valid is not None:
            measured |= self._evaluate(self.valid)
        self.metrics = dict(measured)
        self.stepper.optimizers.after_epoch(measured, self.best_metric)
        if self.stopper is not None:
            self.stopper.update(measured)
        is_best = self._note_best(measured)
        row = {"epoch": self.clock.epoch, "step": self.clock.step, "samples": self.clock.samples, "metrics": measured}
        self.history.append(row)
        if self.watching is not None:
            self.watching.after_epoch(self.history, self.step_s)
        number = self.clock.epoch - 1 if finished else self.clock.epoch
        if self.plan is not None:
            self._unfreeze(self.plan)
        self.console.epoch(number, self.settings.train.epochs, measured, elapsed_s, is_best)
        self._leave_at_stop()
        self._save_after_epoch(is_best)
        if self.signals.asked is not None:
            self._leave()

    def _evaluate(self, valid: Loader) -> dict[str, float]:
        seen = self.watching.gatherer() if self.watching is not None else None
        measured = self.evaluation(valid, "valid", seen)
        self._record("scalars", values=measured)
        if self.watching is not None and seen is not None:
            self.watching.show_seen(seen, "valid", self.step_s)
        return measured

    def _say_bad(self) -> None:
        """Record which samples could not be read so far, where there are more of them than an epoch before."""
        bad = list(self.loader.bad.values())
        if len(bad) > self._num_bad:
            self._num_bad = len(bad)
            self._record("bad_samples", samples_bad=[asdict(one) for one in bad])
            said = "; ".join(f"{one.id}: {one.reason}" for one in bad[:3]) + (" …" if len(bad) > 3 else "")
            self.console.warn(f"samples that cannot be read: {len(bad):,}; {self.loader.on_bad_text} ({said})")

    def _read_train_metrics(self) -> dict[str, float]:
        values = {f"train/{metric.name}": metric.compute() for metric in self.train_metrics}
        for metric in self.train_metrics:
            metric.reset()
        if values:
            self._record("scalars", values=values)
        return values

    def _note_best(self, measured: dict[str, float]) -> bool:
        # without a validation split no epoch is called the best: the training loss would only name the last
        value = measured.get(self.best_metric, math.nan) if self.best_metric else math.nan
        if not is_better(value, self.best.value, self.checkpoints.mode):
            return False
        self.best = Best(self.clock.step, self.clock.epoch, value, dict(measured))
        return True

    def _save_after_epoch(self, is_best: bool) -> None:
        now = time.perf_counter()
        by_epoch = self.settings.checkpoint.every == "epoch"
        if (by_epoch and now - self._last_save >= _SHORT_EPOCH_S) or (not by_epoch and self._is_save_due(now)):
            self.save(wait=False)
        elif is_best and self.settings.checkpoint.keep_best:
            self._check_parameters()
            if not self.checkpoints.hold(self.clock.step, self.state_dict(), self.metrics):
                self.save(wait=False)

    def save(self, wait: bool = True, exact: bool = True) -> None:
        """A checkpoint of this step, with the records up to here made durable before it appears.

        It is durable when this returns, or is written meanwhile where ``wait`` is False.
        """
        self._read()
        self._check_parameters()
        at_epoch_end = bool(self.history) and self.history[-1]["step"] == self.clock.step
        metrics = self.metrics if at_epoch_end else {}
        self.checkpoints.save(self.clock.step, self.state_dict(), metrics, wait=wait, exact=exact)
        self._last_saved_step = self.clock.step
        self._last_save = time.perf_counter()

    def _save_after(self, error: Exception) -> None:
        """Keep what was learned since the last checkpoint where a step failed halfway.

        Its forward may have drawn, and moved statistics: the state is marked as one that goes on to other bits.
        """
        is_kept = self.settings.checkpoint.on_error == "save" and self.clock.step > self._last_saved_step
        if is_kept and not isinstance(error, RunFailedError):
            self.save(exact=False)
            error.add_note(f"the state after step {self.clock.step} was saved, best-effort: {self.go_on}")

    def _check_parameters(self) -> None:
        """The last update may have ruined the parameters after a loss that was still finite.

        Raises:  NonFiniteLossError; what was saved before stands
        """
        floating = [p.detach() for p in self.stepper.model.parameters() if p.is_floating_point() and p.numel()]
        if floating and not bool(torch.stack(torch._foreach_norm(floating)).isfinite().all()):
            raise NonFiniteLossError(
                "the update left parameters that are not finite", where=f"step {self.clock.step}",
                got=samples_text(self._last_indices), expected="finite parameters",
                fix="a lower optimizer.learning_rate or train.clip_norm = 1.0; the last good checkpoint stays",
            )  # fmt: skip

    def _leave(self) -> None:
        if self._last_saved_step != self.clock.step:
            self.save()
        self.checkpoints.join()
        what = f"after step {self.clock.step}; the state is saved"
        if self.signals.asked == signal.SIGTERM:
            raise PreemptedError(f"preempted {what}", fix=self.go_on)
        raise Interrupted(f"interrupted {what}", fix=self.go_on)

    _last_saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the further course, as JSON values and tensors."""
        return {
            "model": dict(self.stepper.model.state_dict()),
            "optimizer": {
                **self.stepper.optimizers.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "averaged": self.average.count if self.average else 0,
            },
            "rng": generator_states(),
            "objects": {name: dict(part.state_dict()) for name, part in self.objects.items()},
            "accumulate": self.settings.train.accumulate,
            "clock": self.clock.state_dict(),
            "loader": self.loader.state_dict(),
            "stopper": self.stopper.state_dict() if self.stopper else None,
            "best": {**vars(self.best)},
            "history": self.history,
            "metrics": self.metrics,
            "window": self.window.state_dict(),
            "epoch_loss": [self._epoch_loss, self._epoch_samples],
            "train_metrics": [metric.state_dict() for metric in self.train_metrics],
            "num_bad": self._num_bad,
            "contract": self._contract,
            "freeze": self.plan.state_dict() if self.plan else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the run that was saved.

        Raises:  CheckpointError where model, optimiser or data are not those of the checkpoint
        """
        if state["accumulate"] != self.settings.train.accumulate:
            raise CheckpointError(
                "a step is of another number of batches", where="train.accumulate",
                got=self.settings.train.accumulate, expected=state["accumulate"],
                fix="resume with the same train.accumulate: steps are counted in it",
            )  # fmt: skip
        if state.get("contract"):
            check_contract(state["contract"], self._contract, self.data_changed)
        load_model(self.stepper.model, state["model"])
        for name, part in self.objects.items():
            part.load_state_dict(state["objects"].get(name, {}))
        self.stepper.optimizers.load_state_dict(state["optimizer"])
        if self.plan is not None and state.get("freeze"):
            self.plan.load_state_dict(state["freeze"])
        if self.average is not None:  # one that is new with this resume begins at the parameters as they are
            saved = state["optimizer"]
            self.average.load_state_dict(saved["average"] or state["model"], saved.get("averaged", 0))
        self.clock.load_state_dict(state["clock"])
        self._choose_loaders()
        if self.data_changed:
            self._go_on_with_other_data()
        else:
            self.loader.load_state_dict(state["loader"])
        if self.stopper is not None and state["stopper"]:
            self.stopper.load_state_dict(state["stopper"])
        self.best = Best(**state["best"])
        self.history, self.metrics = state["history"], state["metrics"]
        self.window.load_state_dict(state["window"])
        self._epoch_loss, self._epoch_samples = state["epoch_loss"]
        for metric, saved in zip(self.train_metrics, state["train_metrics"], strict=True):
            metric.load_state_dict(saved)
        self._num_bad = state.get("num_bad", 0)
        self._plan_log_points()
        self._last_saved_step = self.clock.step
        set_generator_states(state["rng"])  # last: nothing after this may draw

    data_changed = False

    def _go_on_with_other_data(self) -> None:
        """Begin the epoch anew, of the data as they are now; the schedule is stretched over the steps that are left."""
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": self.clock.epoch, "delivered": 0})
        left = (self.settings.train.epochs - self.clock.epoch) * self.steps_per_epoch
        self.total_steps = min(self.clock.step + left, self.settings.train.max_steps or self.clock.step + left)
        self.stepper.optimizers.total_steps = self.total_steps


def load_model(model: torch.nn.Module, tensors: dict[str, Any]) -> None:
    """Put saved parameters and buffers into a model.

    Raises:  CheckpointError naming what is missing, unexpected or of another shape
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            "the model is not that of the checkpoint",
            where=type(model).__name__,
            got="; ".join(line.strip() for line in str(error).splitlines()[1:4]),
            expected="the same parameter names and shapes",
            fix="build the same model, or train in another run folder",
        ) from None
