"""One step: zero gradients, forward, loss, backward, update. Nothing here waits for the device (law 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import gradients
from ..chance import ChanceKey, keyed_seed
from ..contracts import INDEX, Batch, Clock
from ..errors import ModelError
from ..model.describe import shape_text
from .binding import Binding
from .device import Mover, autocast, number_at_hand
from .metrics import Adapted, Metric
from .mixing import Mixing
from .movement import Movement
from .objective import Objective, prediction_of
from .optim import Average, Optimizers

_NOT_LOGGED = frozenset(("loss", "output", "target"))

UserStep = Callable[[nn.Module, Batch, "Context"], Any]


@dataclass
class Context:
    """What a user's own step is told: where and when it is, and how to update.

    ``backward(loss, optimizer)`` clears that optimiser's gradients, runs backward and updates its parameters, so that
    several optimisers can take turns within one step; ``optimizer`` is a name, an optimiser, or left out where there
    is one. During evaluation it does nothing.
    """

    device: torch.device
    step: int
    epoch: int
    training: bool
    seed: int
    backward: Callable[..., None]
    used_backward: bool = field(default=False, repr=False)

    def generator(self, name: str = "step") -> torch.Generator:
        """A torch generator keyed by (seed, step, name)."""
        made = torch.Generator(self.device)
        made.manual_seed(keyed_seed(ChanceKey(self.seed, self.step), name))
        return made


@dataclass
class StepResult:
    """What a step leaves on the device: the loss, and whatever else is to be logged."""

    loss: Tensor
    samples: int
    extras: dict[str, Tensor | float] | None = None


class Stepper:
    """Takes a step with one batch, or with several micro-batches that make one update."""

    def __init__(
        self, binding: Binding, objective: Objective, optimizers: Optimizers, mover: Mover, clock: Clock, *,
        seed: int = 0, precision: str = "fp32", clip_norm: float | None = None, average: Average | None = None,
        metrics: Sequence[Metric | Adapted] = (), user_step: UserStep | None = None, mixing: Mixing | None = None,
    ):  # fmt: skip
        self.model = binding.model
        self.optimizers = optimizers
        self._binding, self._objective, self._mover, self._clock = binding, objective, mover, clock
        self._seed, self._precision, self._clip_norm = seed, precision, clip_norm
        self._average, self._metrics, self._user_step, self._mixing = average, metrics, user_step, mixing
        self._movement = Movement(binding.model)
        self._forward = self._forward_plain if precision == "fp32" else self._forward_autocast

    is_watched = False
    """Whether the next step logs the gradients' norm and how far each part is moved."""

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Update once. ``batches`` are the micro-batches of this step, one in most runs."""
        self.optimizers.set_rates(self._clock.step)
        if self._user_step is not None:
            result = self._own(self._user_step, batches)
        elif len(batches) == 1:
            result = self._single(batches[0])
        else:
            result = self._accumulated(batches)
        self.optimizers.after_step()
        if self._average is not None:
            self._average.update()
        self.is_watched = False
        return result

    def _single(self, batch: Batch) -> StepResult:
        samples = len(batch[INDEX])
        gradients.clear(self.optimizers.parameters)
        loss = self._forward(self._mover(batch))
        gradients.backward(loss, self.optimizers.scaler)
        return StepResult(loss.detach(), samples, self._update())

    def _accumulated(self, batches: Sequence[Batch]) -> StepResult:
        """The gradient of the mean over all samples: each micro-batch counts by its share of targets."""
        gradients.clear(self.optimizers.parameters)
        moved = [self._mover(batch) for batch in batches]
        counts = [self._objective.count(self._binding.target(b), len(b[INDEX])) for b in moved]
        total = sum(counts[1:], counts[0])
        losses = []
        for number, (batch, count) in enumerate(zip(moved, counts, strict=True)):
            part = self._forward(batch, number) * count / total
            gradients.backward(part, self.optimizers.scaler)
            # a mean over no targets at all is no number, and no part of the whole mean either
            losses.append(torch.where(count > 0, part.detach(), 0.0) if isinstance(count, Tensor) else part.detach())
        return StepResult(torch.stack(losses).sum(), sum(len(b[INDEX]) for b in batches), self._update())

    def _forward_plain(self, batch: Batch, part: int = 0) -> Tensor:
        mix = None
        if self._mixing is not None:
            batch, mix = self._mixing(batch, self._clock.step, part)
        output, target = self._binding.call(batch), self._binding.target(batch)
        loss = self._objective(output, target) if mix is None else mix.loss(self._objective, output, target)
        for metric in self._metrics:
            metric.update(prediction_of(output), target if mix is None else mix.larger(target))
        return loss

    def _forward_autocast(self, batch: Batch, part: int = 0) -> Tensor:
        with autocast(self._precision, self._mover.device):
            return self._forward_plain(batch, part)

    def _update(self) -> dict[str, Tensor | float] | None:
        scaler, parameters = self.optimizers.scaler, self.optimizers.parameters
        optimizers = self.optimizers.by_name.values()
        extras: dict[str, Tensor | float] | None = None
        if scaler is not None and (self._clip_norm is not None or self.is_watched):
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        if self._clip_norm is not None:
            extras = {"gradient_norm": gradients.clip(parameters, self._clip_norm)}
        elif self.is_watched:
            extras = {"gradient_norm": gradients.norm(parameters)}
        held = self._movement.before(parameters) if self.is_watched else []
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        return extras if not held else {**(extras or {}), **self._movement.after(held)}

    def _own(self, user_step: UserStep, batches: Sequence[Batch]) -> StepResult:
        samples, losses, extras = sum(len(b[INDEX]) for b in batches), [], None
        many = len(self.optimizers.by_name) > 1
        gradients.clear(self.optimizers.parameters)
        for batch in batches:
            context = self.context(training=True, parts=len(batches))
            with autocast(self._precision, self._mover.device):
                logged = split_logged(user_step(self.model, self._mover(batch), context))
            loss, extras = logged
            if not context.used_backward:
                if many:
                    raise ModelError(
                        "a step with several optimisers says which one each loss belongs to",
                        where=getattr(user_step, "__qualname__", "step"),
                        got=f"no context.backward, optimisers {', '.join(self.optimizers.by_name)}",
                        expected='context.backward(loss, "name")',
                    )
                gradients.backward(loss, self.optimizers.scaler, len(batch[INDEX]) / samples)
            losses.append(loss.detach() * (len(batch[INDEX]) / samples))
        if not context.used_backward:
            extras = {**extras, **more} if (more := self._update()) and extras else more or extras
        return StepResult(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), samples, extras)

    def context(self, training: bool, parts: int = 1) -> Context:
        """What a user's step is told now."""
        made = Context(self._mover.device, self._clock.step, self._clock.epoch, training, self._seed, _no_backward)
        if training:
            made.backward = self._backward_for(made, parts)
        return made

    def _backward_for(self, context: Context, parts: int) -> Callable[..., None]:
        def backward(loss: Tensor, optimizer: str | torch.optim.Optimizer | None = None) -> None:
            if parts > 1:
                raise ModelError(
                    "context.backward updates at once, so that no batches can be accumulated",
                    where="context.backward",
                    got=f"{parts} batches of one step",
                    expected="train.accumulate = 1, or a step that only returns its loss",
                )
            context.used_backward = True
            chosen = self._chosen(optimizer)
            owned = [p for group in chosen.param_groups for p in group["params"]]
            gradients.clear(owned)
            with torch.autocast(self._mover.device.type, enabled=False):
                gradients.backward(loss, self.optimizers.scaler)
                self._update_one(chosen, owned)

        return backward

    def _update_one(self, optimizer: torch.optim.Optimizer, owned: list[nn.Parameter]) -> None:
        scaler = self.optimizers.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self._clip_norm is not None:
            gradients.clip(owned, self._clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def _chosen(self, optimizer: str | torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        by_name = self.optimizers.by_name
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        if optimizer is None and len(by_name) == 1:
            return self.optimizers.main
        if optimizer in by_name:
            return by_name[str(optimizer)]
        raise ModelError(
            "there is no such optimiser", where="context.backward", got=repr(optimizer),
            expected=f"one of {', '.join(by_name)}",
        )  # fmt: skip


def split_logged(logged: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
    """A step's answer as its loss and what else is to be logged.

    Raises:  ModelError where there is no loss in it
    """
    if isinstance(logged, Tensor):
        logged = {"loss": logged}
    loss = logged.get("loss") if isinstance(logged, dict) else None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelError(
            "a step gives its loss", where="step", got=_answer_text(logged),
            expected='{"loss": a tensor of one number, anything to log}',
        )  # fmt: skip
    extras: dict[str, Tensor | float] = {}
    for name, value in logged.items():
        if name in _NOT_LOGGED:
            continue
        if isinstance(value, Tensor):
            if not value.ndim or value.numel() == 1:
                extras[name] = number_at_hand(value)
        elif isinstance(value, (int, float)):
            extras[name] = float(value)
    return loss.reshape(()), extras


def _answer_text(logged: Any) -> str:
    if not isinstance(logged, dict):
        return type(logged).__name__
    return ", ".join(f"{name} {shape_text(value) or type(value).__name__}" for name, value in logged.items()) or "{}"


def _no_backward(loss: Tensor, optimizer: str | torch.optim.Optimizer | None = None) -> None:
    """Evaluation updates nothing."""
