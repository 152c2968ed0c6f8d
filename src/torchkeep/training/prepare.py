"""Everything a training needs, made and checked before the first file is written."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..contracts import Batch, Clock, Json, KeyedDataset, Schema
from ..data.arrays import Arrays
from ..data.cache import Wanted
from ..data.dataset import Part, whole
from ..data.images import Images
from ..data.loader import Backend, Loader
from ..data.reading import OnBad, foreign_of
from ..data.sources import described
from ..data.streams import PROMISE, Stream
from ..errors import ModelError, SettingsError
from ..keep.checkpoint import Checkpoints
from ..keep.stopping import EarlyStopping, Mode, better_mode
from ..model.describe import describe
from ..model.freeze import FreezePlan, evaluating, learning
from ..model.untouched import untouched
from ..watch.console import Console
from ..watch.monitor import check_views
from ..watch.recorder import Recorder
from . import device
from .binding import Binding, batch_text
from .contract import contract_json
from .decisions import Decisions
from .device import Mover, autocast, choose_device, choose_memory, choose_precision, choose_threads, make_scaler
from .evaluate import Evaluation
from .loop import Training
from .metrics import Accuracy, Adapted, ClassCounts, Metric, TopK, make_metrics
from .mixing import Mixing, check_unmixed, make_mixing
from .objective import Objective, check_fit, choose_objective, prediction_of
from .optim import Average, Optimizers, can_fuse, make_optimizer, own_optimizers, rate_factor
from .prefix import Planner, Prefix, picture
from .signals import Signals
from .step import Stepper
from .watching import Watching
from .work import Work

_LOG_EVERY = 50


class Prepared:
    """A training without a folder yet: nothing has been written, everything has been tried.

    Raises:  SettingsError, DataError or ModelError for whatever cannot work
    """

    def __init__(self, work: Work, decisions: Decisions):
        self.work, self.decisions, self.settings = work, decisions, work.settings
        train = work.settings.train
        check_views(work.settings.monitor)
        self.clock = Clock()
        choose_threads(train, decisions)
        self.device = choose_device(train, decisions)
        choose_memory(train, self.device, decisions)
        self.precision = choose_precision(train, self.device, decisions)
        self._was_deterministic = torch.are_deterministic_algorithms_enabled()
        if train.deterministic:
            torch.use_deterministic_algorithms(True)
        work.model.to(self.device)
        for row in work.notes:
            decisions.note(*row)
        self.plan = self._freeze()
        self.loader = self.shuffled_loader()
        self.valid = self._loader(work.valid) if work.valid is not None else None
        self._note_feed()
        if len(self.loader) == 0:
            raise SettingsError(
                "no batch is left of the training data", where="data.last = 'drop'",
                got=f"{len(work.train)} samples, batch_size {work.batch_size}", expected="at least one whole batch",
            )  # fmt: skip
        batch = self.example = self.loader.peek()
        self.mover = Mover(self.device, work.train.schema)
        for loader in (self.loader, self.valid):
            if loader is not None:
                self._send(loader)
        self._note_data()
        self.binding, self.objective = self._bind(batch)
        self.contract = contract_json(work.train.schema, self.binding.keys, batch, None)
        self.metrics = make_metrics(work.metrics if work.metrics is not None else train.metrics)
        self.mixing: Mixing | None = None
        if work.step is None:
            self._try(batch)
        else:
            check_unmixed(train)
        self.steps_per_epoch = math.ceil(len(self.loader) / train.accumulate)
        whole = self.steps_per_epoch * train.epochs
        self.total_steps = min(whole, train.max_steps or whole)
        self.optimizers = self._optimizers()
        self.objects = _stateful_objects(work)
        self._check_all_are_saved()
        self.average = Average(work.model, train.ema) if train.ema or train.swa else None
        self.best_metric, self.best_mode = self._choose_best()
        self.stopper = self._stopper()
        self._note_saving()
        every = work.settings.monitor.log_every or decisions.choose(
            "log_every", _LOG_EVERY, "a log point each 50 steps and at each epoch's end", "monitor.log_every"
        )
        self.log_every = int(every)
        self.train_metrics = self._make_train_metrics()
        self.stepper = Stepper(
            self.binding,
            self.objective,
            self.optimizers,
            self.mover,
            self.clock,
            seed=work.settings.seed,
            precision=self.precision,
            clip_norm=train.clip_norm,
            average=self.average if train.ema else None,
            metrics=self.train_metrics,
            user_step=work.step,
            mixing=self.mixing,
        )
        self.evaluation = Evaluation(
            self.binding,
            self.objective,
            self.mover,
            self.metrics,
            precision=self.precision,
            average=self.average,
            user_step=work.step,
            stepper=self.stepper,
            contract=self.contract,
        )

    def _freeze(self) -> FreezePlan | None:
        chosen = self.settings.freeze
        if chosen is None:
            return None
        built = self.work.built
        head = chosen.head or (built.head if built is not None else None)
        plan = FreezePlan(**{**chosen.model_dump(mode="json"), "head": head})
        plan.apply(self.work.model)
        for row in plan.rows():
            self.decisions.note(*row)
        return plan

    def _make_train_metrics(self) -> list[Metric | Adapted]:
        train = self.work.settings.train
        if not train.train_metrics or self.work.step is not None:
            return []
        given = self.work.metrics if self.work.metrics is not None else train.metrics
        return make_metrics([name for name in given if isinstance(name, str)])

    def _loader(
        self, data: KeyedDataset, *, shuffle: bool = False, last: Literal["keep", "drop"] = "keep",
        on_bad: OnBad | None = None,
    ) -> Loader:  # fmt: skip
        work, feeding = self.work, self.work.feeding
        workers, backend = self._reader(data)
        # an evaluation leaves a bad sample out: another in its place would count twice
        left_out: OnBad = "raise" if feeding.on_bad == "raise" else "mask"
        return Loader(
            data, work.batch_size, shuffle=shuffle and work.weights is None, collate=work.collate,
            seed=work.settings.seed, weights=work.weights if shuffle else None, workers=workers, backend=backend,
            last=last, cache=self._cache(data), on_bad=on_bad or left_out, bad_fraction=feeding.bad_fraction,
        )  # fmt: skip

    def _send(self, loader: Loader) -> None:
        """Have batches begin their way before they are wanted, where there is one, or rows to be left out."""
        if self.mover.copies or self.work.feeding.on_bad != "raise":
            loader.transfer = self.mover.begin

    def _cache(self, data: KeyedDataset) -> Wanted:
        """Which cache: as it was when the run began, for it may change pixels; none where there are no images."""
        recorded = self.decisions.recorded("cache")
        wanted = cast(Wanted, str(recorded).partition(",")[0]) if recorded else self.work.feeding.cache
        return wanted if isinstance(whole(data), Images) else "off"

    def _reader(self, data: KeyedDataset) -> tuple[int | Literal["auto"], Backend]:
        """Who reads: for foreign data as it was chosen by measuring when the run began, for code may count threads."""
        workers, recorded = self.work.feeding.workers, self.decisions.recorded("feeding")
        if workers == "auto" and self.device.type == "cuda" and getattr(data, "threads", False):
            return workers, "threaded_process"  # threads beside the one that launches kernels would hold it up
        if workers != "auto" or foreign_of(data) is None or recorded is None:
            return workers, "auto"
        number, _, kind = str(recorded).partition(" ")
        return (int(number), "processes") if kind == "processes" else (0, "inline")

    def shorten(self, say: Callable[[str], None], epoch: int = 0) -> None:
        """Feed what the frozen part makes of each sample, computed once, where it can be and that pays.

        For the epochs from ``epoch`` on before anything more learns; what the disk keeps of it serves other runs too.
        """
        work, settings = self.work, self.settings
        if settings.features.cache != "on" and all(p.requires_grad for p in work.model.parameters()):
            return
        planner = Planner(self, settings.features, settings.seed, say)
        self._short_epochs = self._frozen_epochs()
        if 0 < self._short_epochs <= epoch:
            return
        self.prefix = planner.plan(work.train, work.valid, self._short_epochs, self._hindrance())
        self._why_whole = planner.note
        if self.prefix is not None:
            self.binding.shorten(planner.rest(self.prefix.frontier))
            train = self._loader(self.prefix.train, shuffle=True, last=work.feeding.last, on_bad="raise")
            valid = self._loader(self.prefix.valid) if self.prefix.valid is not None else None
            self._short = train, valid

    def _hindrance(self) -> str:
        """What keeps samples from being known by their number alone; empty for nothing."""
        work = self.work
        found = {
            "a step of your own": work.step is not None,
            "a collate of your own": work.collate is not None,
            "inputs are mixed": self.mixing is not None,
            "a stream has no samples by number": isinstance(work.train, Stream),
            'samples that cannot be read are replaced: data.on_bad = "raise"': work.feeding.on_bad != "raise",
            "nothing is frozen for a whole epoch": not self._short_epochs,
        }
        return next((reason for reason, is_so in found.items() if is_so), "")

    def _frozen_epochs(self) -> int:
        """Whole epochs, from the first, in which nothing more learns than at the start."""
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        later = [begin for begin, _ in self.plan.spans if begin != (0, 0)] if self.plan is not None else []
        return min([epochs, *(epoch or step // self.steps_per_epoch for epoch, step in later)])

    def loaders_at(self, epoch: int) -> tuple[Loader, Loader | None]:
        """What feeds an epoch and its evaluation: the samples, or what is kept of their frozen part."""
        return self._short if self._short is not None and epoch < self._short_epochs else (self.loader, self.valid)

    def trainable(self) -> Json:
        """What learns now, as ``show_trainable`` and ``trainable_svg`` take it; None without a plan."""
        if self.plan is None:
            return None
        if self._seconds is None:
            example = self.mover(self.example)
            few = {name: value[:4] if isinstance(value, Tensor) else value for name, value in example.items()}
            is_own = self.work.step is not None
            rows = [] if is_own else describe(self.work.model, lambda: self.binding.whole(few))
            self._seconds = {row.name: row.forward_s or 0.0 for row in rows}
        return picture(self.plan.map(), self._seconds, self.prefix, self._why_whole)

    first_forward_s = 0.0
    """Seconds of the first forward, one batch in eval mode; 0 for a step of the user's own."""

    _seconds: dict[str, float] | None = None
    _why_whole: str | None = None
    _short: tuple[Loader, Loader | None] | None = None
    _short_epochs = 0
    prefix: Prefix | None = None

    def shuffled_loader(self) -> Loader:
        """Another loader over the training split, as the training's own begins."""
        return self._loader(self.work.train, shuffle=True, last=self.work.feeding.last, on_bad=self.work.feeding.on_bad)

    def evaluation_loader(self, data: KeyedDataset) -> Loader:
        """A loader over a split, in order, whose batches are on their way to the device."""
        loader = self._loader(data)
        self._send(loader)
        return loader

    def measure(self, data: KeyedDataset, split: str) -> dict[str, float]:
        """Loss and metrics of the model as it is now, on any data of the same form."""
        with contextlib.closing(self.evaluation_loader(data)) as loader:
            return self.evaluation(loader, split)

    @contextlib.contextmanager
    def borrowed_model(self) -> Iterator[nn.Module]:
        """The model for other parameters to be put in, without its moving average; its own come back afterwards."""
        model, evaluation = self.work.model, self.evaluation
        own = {name: value.clone() for name, value in model.state_dict().items()}
        average, evaluation.average = evaluation.average, None
        try:
            yield model
        finally:
            evaluation.average = average
            model.load_state_dict(own)

    def _note_feed(self) -> None:
        plan = self.loader.plan
        value = plan.backend if not plan.workers else f"{plan.workers} {plan.backend}"
        self.decisions.note("feeding", value, plan.reason, "data.workers")
        cached = self.loader.cache_plan
        if self.work.feeding.cache != "off":
            self.decisions.choose("cache", cached.said, cached.reason, "data.cache")
        foreign, valid = foreign_of(self.work.train), self.work.valid
        if isinstance(self.work.train, Stream):
            self.decisions.note("resume", "as the stream repeats", PROMISE)
        if foreign is not None and not foreign.probe.repeatable:
            reason = "the dataset draws from a generator of its own, which nobody can rewind"
            self.decisions.note("resume", "best-effort", reason)
        if foreign is not None and foreign.draws and isinstance(valid, Part) and foreign_of(valid) is foreign:
            reason = "what the training dataset draws cannot be left out of its validation part"
            self.decisions.note("validation", "augmented too", reason, "data.valid")

    def _note_data(self) -> None:
        for row in described(self.work.train):
            self.decisions.note(*row)
        if self.loader.has_buckets:
            reason = "batches of about equally long samples, mixed again: little is padded"
            self.decisions.note("buckets", "by length", reason)

    def _bind(self, batch: Batch) -> tuple[Binding, Objective]:
        work, train = self.work, self.work.settings.train
        loss = work.loss if work.loss is not None else train.loss
        wants_own = loss in (None, "auto") if not callable(loss) else False
        known = work.train.schema.targets
        binding = Binding(work.model, batch, known, work.inputs, work.targets, with_targets=wants_own)
        target = binding.target(batch) if work.step is None else None
        field = work.train.schema.fields.get(binding.targets[0]) if len(binding.targets) == 1 else None
        objective, reason = choose_objective(loss, binding, target, train.class_weights, train.label_smoothing, field)
        if work.step is None:
            override = "" if work.is_recipe else "inputs="
            self.decisions.note("inputs", binding.how, f"forward of {type(work.model).__name__}", override)
            self.decisions.note("loss", objective.name, reason, "train.loss")
        return binding, objective

    def _try(self, batch: Batch) -> None:
        """One forward on the first batch, leaving nothing behind: a misfit is said before a file is written."""
        model = self.work.model
        with untouched(model), evaluating(model), torch.no_grad(), autocast(self.precision, self.device):
            moved = self.mover(batch)
            began = time.perf_counter()
            try:
                output = self.binding.call(moved)
            except Exception as error:
                raise ModelError(
                    "the model cannot take this batch",
                    where=f"{type(model).__name__}, inputs {self.binding.how}",
                    got=f"{type(error).__name__}: {error} - with {batch_text(batch)}",
                    expected="a forward that takes the batch's inputs",
                    fix="inputs= names the keys; tk.inspect(model, batch) shows each module's shapes",
                ) from error
            self.first_forward_s = time.perf_counter() - began
            target = self.binding.target(moved)
            schema = self.work.train.schema
            self.contract = contract_json(schema, self.binding.keys, batch, output)
            classes = max([schema[name].num_classes for name in schema.targets] or [0])
            self._check_weights(classes)
            where = f"{type(model).__name__}, loss {self.objective.name}"
            check_fit(self.objective, output, target, self._label_classes(), where, is_exact=self._knows_classes())
            self._try_metrics(prediction_of(output), target)
            settings, inputs = self.work.settings, self.work.inputs
            self.mixing = make_mixing(settings, inputs, moved, self.binding, self.objective, output)

    def _knows_classes(self) -> bool:
        # arrays only imply their classes: a head of ten may be trained on a part that has eight
        return not isinstance(whole(self.work.train), Arrays)

    def _label_classes(self) -> int:
        """The classes that the outputs must tell apart, over all splits."""
        splits = [data for data in (self.work.train, self.work.valid, self.work.test) if data is not None]
        fields = [data.schema[name] for data in splits for name in data.schema.targets]
        return max([field.num_classes for field in fields if field.kind in ("label", "mask")] or [0])

    def _try_metrics(self, output: Any, target: Any) -> None:
        fields = [self.work.train.schema.fields.get(name) for name in self.binding.targets]
        is_number = any(field is not None and field.kind == "number" for field in fields)
        for metric in self.metrics:
            if is_number and isinstance(metric, Accuracy | TopK | ClassCounts):
                raise SettingsError(
                    "this metric is of classes, and the target is a number", where=f"train.metrics: {metric.name}",
                    got="a target of numbers", expected="r2, mean_absolute_error",
                )  # fmt: skip
            try:
                metric.update(output, target)
                metric.compute()
            except Exception as error:
                said = f"{error.got}" if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
                raise SettingsError(
                    "this metric does not fit the data", where=f"train.metrics: {metric.name}", got=said,
                    expected=error.expected if isinstance(error, ModelError) else "a metric of this kind of target",
                ) from error  # fmt: skip
            finally:
                metric.reset()

    def _check_weights(self, classes: int) -> None:
        weights = self.work.settings.train.class_weights
        if weights and classes and len(weights) != classes:
            raise SettingsError(
                "there is one weight for each class", where="train.class_weights", got=f"{len(weights)} weights",
                expected=f"{classes}",
            )  # fmt: skip

    def _optimizers(self) -> Optimizers:
        work, settings = self.work, self.work.settings.optimizer
        if work.optimizer is not None and not isinstance(work.optimizer, str):
            by_name = own_optimizers(work.optimizer, work.model)
            if self.plan is not None:
                self.plan.adopt(by_name.values(), is_scheduled=hasattr(work.schedule, "state_dict"))
        else:
            by_name = {"main": make_optimizer(work.model, settings, self._choose_fused(), work.load, self.plan)}
            if settings.name in ("adamw", "sgd") and settings.weight_decay and settings.decay == "matrices":
                self.decisions.note(
                    "weight decay", "matrices only", "biases and normalisation are left out", "optimizer.decay"
                )
        scaler = make_scaler(self.precision, self.device)
        factor, scheduler = None, None
        if work.schedule is None or isinstance(work.schedule, str):
            name, warmup = settings.schedule, settings.warmup
            if name != "constant" or warmup:
                factor = lambda step, total: rate_factor(step, total, name, warmup)  # noqa: E731
        elif hasattr(work.schedule, "state_dict") and hasattr(work.schedule, "step"):
            scheduler = work.schedule
        elif _makes_scheduler(work.schedule):
            _check_one(by_name)
            scheduler = work.schedule(next(iter(by_name.values())))
        else:
            factor = work.schedule
        return Optimizers(by_name, factor, self.total_steps, scheduler, work.schedule_every, scaler)

    def _check_all_are_saved(self) -> None:
        """Every parameter that an optimiser moves must be part of a checkpoint."""
        saved = {id(p) for owner in (self.work.model, *self.objects.values()) for p in _parameters_of(owner)}
        strange = [p for p in self.optimizers.parameters if id(p) not in saved]
        if strange:
            raise SettingsError(
                "an optimiser moves parameters that no checkpoint would hold",
                where="optimizer",
                got=f"{len(strange)} parameters, first of shape {tuple(strange[0].shape)}",
                expected="parameters of the model, or of a loss or step that is an nn.Module",
                fix="make the optimiser after the model's last change; or make them part of the model, of a loss "
                "module, or of a step with state_dict()",
            )

    def _choose_fused(self) -> bool:
        chosen = self.work.settings.optimizer
        if chosen.fused != "auto" or chosen.name not in ("adamw", "sgd"):
            return chosen.fused is True
        fused, reason = can_fuse(learning(self.work.model)), "one kernel for all parameters"
        return bool(self.decisions.choose("fused update", fused, reason, "optimizer.fused"))

    def _note_saving(self) -> None:
        if self.work.settings.checkpoint.every == "epoch":
            reason = "a short epoch's best waits in memory for the next save"
            self.decisions.note("saving", "each epoch, 10 s apart at least", reason, "checkpoint.every")

    def _choose_best(self) -> tuple[str | None, Mode]:
        chosen = self.work.settings.checkpoint
        known = self._measured
        if self.valid is None:
            if chosen.metric is not None:
                raise SettingsError(
                    "the best checkpoint is chosen on a validation split", where="checkpoint.metric",
                    got=f"{chosen.metric!r} and no validation data", expected="data.valid or data.valid_fraction",
                )  # fmt: skip
            return None, "min"
        self._check_measured("checkpoint.metric", chosen.metric)
        metric = chosen.metric or (known[1] if len(known) > 1 else known[0])
        mode: Mode = better_mode(metric) if chosen.mode == "auto" else chosen.mode
        if chosen.metric is None:
            reason = "the first metric on the validation split" if self.metrics else "there are no metrics"
            self.decisions.choose("best", f"{metric} ({mode})", reason, "checkpoint.metric")
        return metric, mode

    @property
    def _measured(self) -> list[str]:
        return [f"valid/{name}" for name in ("loss", *(metric.name for metric in self.metrics))]

    def _check_measured(self, where: str, metric: str | None) -> None:
        if metric is not None and metric not in [*self._measured, "train/loss"]:
            raise SettingsError(
                "this metric is not measured", where=where, got=repr(metric),
                expected=f"one of {', '.join(self._measured)}", fix="add it to train.metrics",
            )  # fmt: skip

    def _stopper(self) -> EarlyStopping | None:
        chosen = self.work.settings.early_stopping
        if chosen.patience is None:
            return None
        metric = chosen.metric or self.best_metric
        self._check_measured("early_stopping.metric", chosen.metric)
        if metric is None:
            raise SettingsError(
                "early stopping watches a validation split", where="early_stopping.patience",
                got="no validation data", expected="data.valid or data.valid_fraction",
            )  # fmt: skip
        mode: Mode = better_mode(metric) if chosen.mode == "auto" else chosen.mode
        return EarlyStopping(metric, mode, chosen.patience, chosen.min_delta, chosen.warmup)

    def training(
        self, checkpoints: Checkpoints, recorder: Recorder, console: Console, signals: Signals, go_on: str,
        watching: Watching | None = None,
    ) -> Training:  # fmt: skip
        """The training itself, once it has a folder."""
        return Training(self, checkpoints, recorder, console, signals, go_on, watching)

    @property
    def is_own_step(self) -> bool:
        return self.work.step is not None

    @property
    def schema(self) -> Schema:
        return self.work.train.schema

    @property
    def chance_loss(self) -> float | None:
        """The loss of guessing among as many classes as there are; None where the loss is no cross-entropy."""
        classes = [self.schema[name].num_classes for name in self.schema.targets]
        is_known = self.objective.name == "cross_entropy" and len(classes) == 1 and classes[0] > 1
        return math.log(classes[0]) if is_known else None

    def forward(self, batch: Batch) -> Any:
        """The whole model on a batch that is on the device."""
        with autocast(self.precision, self.device):
            return self.binding.whole(batch)

    def close(self) -> None:
        """End the loaders' workers, and leave torch's own settings as they were."""
        torch.use_deterministic_algorithms(self._was_deterministic)
        if self.plan is not None:
            self.plan.release()
        self.loader.close()
        if self.valid is not None:
            self.valid.close()
        device.give_back_memory()


def _stateful_objects(work: Work) -> dict[str, Any]:
    """A program's own objects that have a memory: their state is saved beside the model's."""
    given = {"loss": work.loss, "step": work.step, "collate": work.collate}
    return {name: o for name, o in given.items() if hasattr(o, "state_dict") and hasattr(o, "load_state_dict")}


def _parameters_of(owner: Any) -> list[Any]:
    if isinstance(owner, nn.Module):
        return list(owner.parameters())
    parts = [part for part in vars(owner).values() if isinstance(part, nn.Module)] if hasattr(owner, "__dict__") else []
    return [parameter for part in parts for parameter in part.parameters()]


def _check_one(by_name: dict[str, torch.optim.Optimizer]) -> None:
    if len(by_name) > 1:
        raise SettingsError(
            "a scheduler steers one optimiser", where="schedule", got=f"optimisers {', '.join(by_name)}",
            expected="a function (step, total_steps) → factor, which steers all",
        )  # fmt: skip


def _makes_scheduler(schedule: Any) -> bool:
    """A function of the optimiser, told from a function (step, total_steps) by how much it takes."""
    import inspect

    needed = [p for p in inspect.signature(schedule).parameters.values() if p.default is p.empty]
    return len(needed) == 1
