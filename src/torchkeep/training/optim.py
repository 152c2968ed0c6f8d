"""The optimisers and their rates. ``rate_factor`` is a pure function of the step; only ``Optimizers`` assigns rates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from ..errors import CheckpointError, SettingsError, TorchkeepError
from ..keep.stopping import better_mode
from ..model.freeze import FreezePlan, decay_groups, learning
from ..settings import Settings
from ..usercode import is_reference

Schedule = Literal["constant", "linear", "cosine", "one_cycle"]
RateFactor = Callable[[int, int], float]

# the shape of torch.optim.lr_scheduler.OneCycleLR's defaults
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1 / 25e4
_ONE_CYCLE_RISE = 0.3


_Share = Annotated[float, Setting(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """[optimizer]: the update, its rate over time, and weight decay."""

    name: str = "adamw"
    """"adamw", "sgd", or file.py:function(model) that gives an optimiser."""
    learning_rate: float = Setting(default=1e-3, gt=0)
    """The rate; the peak of it where the schedule rises and falls."""
    weight_decay: float = Setting(default=0.01, ge=0)
    """Decoupled decay for AdamW, L2 for SGD."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: "matrices" leaves out biases and normalisation (every parameter of fewer than 2 dimensions)."""
    momentum: float = Setting(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    nesterov: bool = False
    """SGD's look-ahead."""
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    """AdamW's averaging of the gradient and of its square."""
    eps: float = Setting(default=1e-8, gt=0)
    """AdamW's guard against division by zero."""
    fused: Literal["auto"] | bool = "auto"
    """One kernel for all parameters; "auto": where every parameter is a floating one."""
    schedule: Schedule = "constant"
    """The rate over the steps: "constant", "linear" or "cosine" to zero, "one_cycle"."""
    warmup: float = Setting(default=0.0, ge=0)
    """Linear rise at the start: a number of steps, or a share of the run where below 1; one_cycle rises over 0.3."""


def rate_factor(step: int, total_steps: int, schedule: Schedule, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by for the update after ``step`` updates.

    Units:   1 is the set learning rate
    Source:  one_cycle: Smith & Topin 2018 (arXiv 1708.07120) with cosine halves, as in torch's OneCycleLR
    """
    if schedule == "one_cycle":
        return _one_cycle(step, total_steps, warmup or _ONE_CYCLE_RISE)
    rise = warmup if warmup >= 1 else warmup * total_steps
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rise) / max(1.0, total_steps - rise))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _one_cycle(step: int, total_steps: int, warmup: float) -> float:
    peak = max(1.0, warmup if warmup >= 1 else warmup * total_steps) - 1
    if step <= peak:
        return _between(_ONE_CYCLE_START, 1.0, step / max(1.0, peak))
    return _between(1.0, _ONE_CYCLE_END, min(1.0, (step - peak) / max(1.0, total_steps - 1 - peak)))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def make_optimizer(
    model: nn.Module, settings: OptimizerSettings, fused: bool, load: Callable[[str], Any],
    plan: FreezePlan | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimiser that the settings name.

    Raises:  SettingsError if the name is unknown or nothing learns
    """
    if is_reference(settings.name):
        given = _checked(_made(settings.name, lambda: load(settings.name)(model)), settings.name)
        if plan is not None:
            plan.adopt([given])
        return given
    parameters = learning(model)
    if not parameters:
        raise SettingsError(
            "nothing in this model learns", where=type(model).__name__, got="no parameter with requires_grad",
            expected="at least one",
        )  # fmt: skip
    chosen = (settings.weight_decay, settings.decay)
    groups = plan.groups(model, settings.learning_rate, *chosen) if plan else decay_groups(parameters, *chosen)
    own: dict[str, dict[str, Any]] = {
        "adamw": {"betas": settings.betas, "eps": settings.eps},
        "sgd": {"momentum": settings.momentum, "nesterov": settings.nesterov},
    }
    if settings.name not in own:
        raise SettingsError(
            "there is no such optimiser", where="optimizer.name", got=repr(settings.name),
            expected='"adamw", "sgd" or file.py:function',
            fix="tk.fit(optimizer=…) takes any torch.optim.Optimizer",
        )  # fmt: skip
    kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.name]
    made: torch.optim.Optimizer = _made(
        settings.name, lambda: kind(groups, lr=settings.learning_rate, fused=fused or None, **own[settings.name])
    )
    return made


def _made(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        if isinstance(error, TorchkeepError):
            raise
        raise SettingsError(
            "this optimiser cannot be made", where=f"optimizer.name = {name!r}",
            got=f"{type(error).__name__}: {error}", expected="settings that it takes",
        ) from error  # fmt: skip


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether one kernel can update all parameters: floating ones on devices that torch has it for."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters)


def _checked(optimizer: Any, where: str) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    raise SettingsError(
        "this gives no optimiser", where=where, got=type(optimizer).__name__, expected="a torch.optim.Optimizer"
    )


def own_optimizers(given: Any, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """A user's optimiser, several by name, or a function of the model that gives either."""
    if callable(given) and not isinstance(given, torch.optim.Optimizer):
        given = given(model)
    if isinstance(given, Mapping):
        return {str(name): _checked(optimizer, f"optimizer[{name!r}]") for name, optimizer in given.items()}
    return {"main": _checked(given, "tk.fit(optimizer=…)")}


class Optimizers:
    """One or several optimisers, their schedule and the scaler: everything that an update changes but the model."""

    def __init__(
        self, by_name: dict[str, torch.optim.Optimizer], factor: RateFactor | None, total_steps: int,
        scheduler: Any = None, scheduler_every: Literal["step", "epoch"] = "step",
        scaler: torch.amp.GradScaler | None = None,
    ):  # fmt: skip
        self.by_name = by_name
        self.scaler = scaler
        self._factor = factor
        self.total_steps = total_steps
        self.scheduler = scheduler
        self._wants_metric = scheduler is not None and "metrics" in inspect.signature(scheduler.step).parameters
        # ReduceLROnPlateau watches evaluations, of which an epoch has one
        self._every = "epoch" if self._wants_metric else scheduler_every
        _check_owner(scheduler, by_name)
        self._scheduled: list[tuple[dict[str, Any], float]] = []
        self._used: dict[str, float] = {}
        if factor is not None:
            groups = [group for optimizer in by_name.values() for group in optimizer.param_groups]
            self._scheduled = [(group, float(group.setdefault("initial_lr", group["lr"]))) for group in groups]
        self.parameters = _distinct(by_name)
        self._configured = {name: _options(optimizer) for name, optimizer in by_name.items()}

    @property
    def main(self) -> torch.optim.Optimizer:
        return next(iter(self.by_name.values()))

    @property
    def steps_scheduler(self) -> bool:
        """Whether a scheduler object counts steps, not epochs."""
        return self._every == "step"

    def set_rates(self, step: int) -> None:
        """Assign the rates for the update after ``step`` updates."""
        if self._factor is None:
            return
        factor = self._factor(step, self.total_steps)
        for group, rate in self._scheduled:
            group["lr"] = rate * factor

    def after_step(self) -> None:
        """Advance a scheduler object that counts steps."""
        if self.scheduler is not None and self._every == "step":
            self._used = self._current()
            self.scheduler.step()

    def after_epoch(self, measured: dict[str, float], best_metric: str | None) -> None:
        """Advance a scheduler object that counts epochs, or one that watches a metric.

        One that watches gets the metric that picks the best where that counts the same way, else a loss.
        """
        if self.scheduler is None or self._every != "epoch":
            return
        if not self._wants_metric:
            self.scheduler.step()
            return
        mode = getattr(self.scheduler, "mode", "min")
        tags = [tag for tag in (best_metric, "valid/loss", *measured) if tag in measured and better_mode(tag) == mode]
        if tags:
            self.scheduler.step(measured[tags[0]])

    def _keep_changed(self, name: str, before: list[dict[str, Any]]) -> None:
        for group, old, new in zip(self.by_name[name].param_groups, before, self._configured[name], strict=True):
            changed = {key: value for key, value in new.items() if key in old and old[key] != value}
            if self.scheduler is not None:
                changed.pop("lr", None)  # where the rate stands is the scheduler's state
            group.update(changed)
            if "lr" in changed and "initial_lr" in group:
                group["initial_lr"] = changed["lr"]

    def rates(self) -> dict[str, float]:
        """The learning rate that the last update of each optimiser's first group was taken with, by tag."""
        return self._used or self._current()

    def _current(self) -> dict[str, float]:
        if len(self.by_name) == 1:
            return {"train/learning_rate": float(self.main.param_groups[0]["lr"])}
        return {f"train/learning_rate/{name}": float(o.param_groups[0]["lr"]) for name, o in self.by_name.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.by_name.items()},
            "configured": self._configured,
            "scheduler": _plain_state(self.scheduler) if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was saved; an option that was set otherwise since then stands as it is set now.

        Raises:  CheckpointError where the optimisers or their parameter groups are not the saved ones
        """
        if state["optimizers"].keys() != self.by_name.keys():
            raise CheckpointError(
                "the optimisers are not those of the checkpoint", where="optimizer", got=", ".join(self.by_name),
                expected=", ".join(state["optimizers"]),
            )  # fmt: skip
        for name, saved in state["optimizers"].items():
            try:
                self.by_name[name].load_state_dict(saved)
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    "an optimiser does not fit the checkpoint", where=f"optimizer {name!r}", got=error
                ) from error
        for name, before in state["configured"].items():
            self._keep_changed(name, before)
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._scheduled = [
            (group, float(group["initial_lr"]))
            for optimizer in self.by_name.values()
            for group in optimizer.param_groups
            if self._factor is not None
        ]


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group as they were set, not as a schedule has moved them."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        {key: value for key, value in group.items() if key not in ("params", "initial_lr") and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]


def _distinct(by_name: dict[str, torch.optim.Optimizer]) -> list[nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for optimizer in by_name.values():
        for group in optimizer.param_groups:
            found |= {id(parameter): parameter for parameter in group["params"]}
    return list(found.values())


def _check_owner(scheduler: Any, by_name: dict[str, torch.optim.Optimizer]) -> None:
    owner = getattr(scheduler, "optimizer", None)
    if isinstance(owner, torch.optim.Optimizer) and all(owner is not optimizer for optimizer in by_name.values()):
        raise SettingsError(
            "this scheduler steers another optimiser than the one that trains",
            where="schedule",
            got=f"{type(scheduler).__name__} of another {type(owner).__name__}",
            expected="a scheduler of the optimizer that is given",
            fix="optimizer= takes the scheduler's optimiser; schedule= also takes a function optimizer → scheduler",
        )


_LEFT_OUT = object()


def _plain_state(scheduler: Any) -> Any:
    # a scheduler keeps callables among its state, and a chain of schedulers their states
    return _plain(scheduler.state_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: kept for name, item in value.items() if (kept := _plain(item)) is not _LEFT_OUT}
    if isinstance(value, list | tuple):
        return type(value)(None if (kept := _plain(item)) is _LEFT_OUT else kept for item in value)
    return value if value is None or isinstance(value, bool | int | float | str | Tensor) else _LEFT_OUT


class Average:
    """A moving average of the parameters, which evaluation and the best checkpoint's ``average`` use.

    With ``decay`` an exponential one: ``average = decay × average + (1 - decay) × parameters``; buffers follow the
    model. Without it all that ``update`` sees weighs the same, running statistics of normalisation too.

    Source:  Polyak & Juditsky 1992; equal weights: Izmailov et al. 2018 (arXiv 1803.05407)
    """

    def __init__(self, model: nn.Module, decay: float | None):
        kind = Tensor if decay is None else nn.Parameter
        named = model.state_dict(keep_vars=True)  # a tied parameter is saved under each of its names
        held = {name: t for name, t in named.items() if isinstance(t, kind) and t.is_floating_point()}
        distinct = list({id(t): t for t in held.values()}.values())
        places = {id(t): place for place, t in enumerate(distinct)}
        self._live = distinct
        self._names = {name: places[id(t)] for name, t in held.items()}
        self._kept = [t.detach().clone() for t in distinct]
        self._decay, self.count = decay, 0
        self.follow()

    def follow(self) -> None:
        """See anew what learns: an average of what stays may not even change a sign of zero."""
        moves = [t.requires_grad or not isinstance(t, nn.Parameter) for t in self._live]
        pairs = [pair for pair, is_moving in zip(zip(self._kept, self._live, strict=True), moves, strict=True)
                 if is_moving]  # fmt: skip
        self._moving = [kept for kept, _ in pairs], [live.detach() for _, live in pairs]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        share = 1.0 / self.count if self._decay is None else 1.0 - self._decay
        torch._foreach_lerp_(*self._moving, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the model's parameters; a second call undoes it."""
        if self._decay is None and not self.count:
            return
        for live, kept in zip(self._live, self._kept, strict=True):
            held = live.detach().clone()
            live.copy_(kept)
            kept.copy_(held)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The averages by name; None before there are any."""
        if self._decay is None and not self.count:
            return None
        return {name: self._kept[place] for name, place in self._names.items()}

    def load_state_dict(self, state: dict[str, Tensor], count: int) -> None:
        self.count = count
        for name, place in self._names.items():
            self._kept[place].copy_(state[name])
        self.follow()
