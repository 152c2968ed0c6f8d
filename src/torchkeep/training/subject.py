"""What the checks before a training look at: the prepared run with its first batch, and what one forward of it gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import gradients
from ..contracts import INDEX, Batch, Field
from ..model.freeze import evaluating
from .device import autocast
from .objective import prediction_of
from .step import Context, split_logged

if TYPE_CHECKING:
    from .prepare import Prepared

Verdict = Literal["passed", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it.

    "warning": mostly a mistake. "error": nothing can be learned so, and a training does not begin. "skipped": it does
    not apply, or there was no time; ``found`` says why. ``seconds`` is what the check took.
    """

    check: str
    verdict: Verdict
    found: str
    expected: str = ""
    fix: str = ""
    seconds: float = 0.0

    @property
    def is_blamed(self) -> bool:
        return self.verdict in ("warning", "error")


def passed(found: str) -> Finding:
    return Finding("", "passed", found)


def skipped(why: str) -> Finding:
    return Finding("", "skipped", why)


def warning(found: str, expected: str, fix: str) -> Finding:
    return Finding("", "warning", found, expected, fix)


def error(found: str, expected: str, fix: str) -> Finding:
    return Finding("", "error", found, expected, fix)


class Subject:
    """A prepared training as the checks see it. Whatever they do, ``preflight`` puts the state back afterwards.

    ``batch`` is the first batch on the device, all of it; ``few`` the first rows of it, which are what the time allows.
    """

    def __init__(self, prepared: Prepared, rows: int | None = None):
        self.prepared = prepared
        self.work, self.objective, self.binding = prepared.work, prepared.objective, prepared.binding
        self.model: nn.Module = prepared.work.model
        self.batch: Batch = prepared.mover(prepared.example)
        self.num_rows = len(self.batch[INDEX])
        self.few = first_rows(self.batch, min(rows or self.num_rows, self.num_rows))

    @property
    def targets(self) -> Any:
        """The truth of ``few``; None where there is none, or where a step of the user's own finds it."""
        return None if self.work.step is not None else self.binding.target(self.few)

    @property
    def target_field(self) -> Field | None:
        """What the data know of the target, where there is one."""
        names = self.binding.targets
        return self.work.train.schema.fields.get(names[0]) if len(names) == 1 else None

    @cached_property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters that learn, by name, each once."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def forward(self, batch: Batch) -> Any:
        """The model's output in the mode it is in."""
        with autocast(self.prepared.precision, self.prepared.device):
            return self.binding.whole(batch)

    def predicted(self, batch: Batch) -> Tensor:
        """The prediction in eval mode, without a graph: logits or numbers, detached.

        Raises:  TypeError where the model gives no tensor
        """
        with evaluating(self.model), torch.no_grad():
            output = prediction_of(self.forward(batch))
        if not isinstance(output, Tensor):
            raise TypeError(f"the model gives {type(output).__name__}")
        return output.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The loss with its graph, in the mode the model is in; of a step of the user's own the first that it gives."""
        return next(iter(self.losses(batch).values()))

    def losses(self, batch: Batch, each: Callable[[Tensor], None] | None = None) -> dict[str, Tensor]:
        """The losses with their graphs: one, or what a step of the user's own gives to ``context.backward``, by name.

        ``each`` is called with a loss as soon as it is there, before what follows it.
        """
        step, device = self.work.step, self.prepared.device
        found: dict[str, Tensor] = {}

        def take(loss: Tensor, optimizer: Any = None) -> None:
            found[str(optimizer) if isinstance(optimizer, str) else f"loss {len(found) + 1}"] = loss
            if each is not None:
                each(loss)

        with autocast(self.prepared.precision, device):
            if step is None:
                take(self.objective(self.binding.whole(batch), self.binding.target(batch)), "loss")
                return found
            clock = self.prepared.clock
            context = Context(device, clock.step, clock.epoch, True, self.work.settings.seed, take)
            loss, _ = split_logged(step(self.model, batch, context))
            if not found:
                take(loss, "loss")
        return found

    def seconds_of(self, work: Callable[[], Any]) -> float:
        """How long this takes, Unix s, to the end of what the device has to do."""
        began = time.perf_counter()
        work()
        if self.prepared.device.type == "cuda":
            torch.cuda.synchronize(self.prepared.device)
        return time.perf_counter() - began

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Leave the gradients of one batch's losses in ``.grad``, from none; the losses, detached."""
        gradients.clear(self.model.parameters())
        found = self.losses(batch, lambda loss: gradients.backward(loss) if loss.requires_grad else None)
        return {name: loss.detach() for name, loss in found.items()}


def first_rows(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch, whatever is nested in it."""
    size = len(batch[INDEX])
    return {name: _cut(value, slice(0, rows), size) for name, value in batch.items()}


def taken_rows(batch: Batch, order: Tensor) -> Batch:
    """The rows of a batch in another order: ``order`` (N,) int64."""
    size = len(batch[INDEX])
    return {name: _cut(value, order, size) for name, value in batch.items()}


def _cut(value: Any, rows: Any, size: int) -> Any:
    if isinstance(value, Tensor):
        index = rows.to(value.device) if isinstance(rows, Tensor) else rows
        return value[index] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {name: _cut(item, rows, size) for name, item in value.items()}
    if isinstance(value, list) and len(value) == size:
        return value[rows] if isinstance(rows, slice) else [value[number] for number in rows.tolist()]
    return value
