"""What the checks before a training look at: the prepared run with its first batch, and what a forward of it gives."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import gradients
from ..contracts import INDEX, Batch, Field
from ..data.reading import foreign_of
from ..data.streams import Stream
from ..model.followed import is_finite
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


@dataclass
class FirstPass:
    """One forward and backward: the losses, their graphs, what it took, and which parameters got nothing."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    roots: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    activation_bytes: int = 0
    without_gradient: set[str] = field(default_factory=set)
    not_finite: set[str] = field(default_factory=set)


class Subject:
    """A prepared training as the checks see it. Whatever they do, ``preflight`` puts the state back afterwards.

    ``batch`` is the first batch on the device, all of it; ``few`` the first rows of it, which are what the time allows.
    """

    deadline = math.inf
    """When the check under way should end, of ``time.perf_counter``: what loops has to look at it."""

    def __init__(self, prepared: Prepared, rows: int | None = None):
        self.prepared = prepared
        self.work, self.objective, self.binding = prepared.work, prepared.objective, prepared.binding
        self.model: nn.Module = prepared.work.model
        self.batch: Batch = prepared.mover(prepared.example)
        self.num_rows = len(self.batch[INDEX])
        self.few = first_rows(self.batch, min(rows or self.num_rows, self.num_rows))

    @property
    def forward_s(self) -> float:
        """What a forward of ``few`` takes, seconds, as far as the first one of a whole batch tells."""
        return self.prepared.first_forward_s * len(self.few[INDEX]) / self.num_rows

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline

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

    @property
    def num_learning_bytes(self) -> int:
        return sum(parameter.nbytes for _, parameter in self.parameters)

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
            name = optimizer if isinstance(optimizer, str) and optimizer not in found else f"loss {len(found) + 1}"
            found[name] = loss
            if each is not None:
                each(loss)

        with autocast(self.prepared.precision, device):
            if step is None:
                take(self.objective(self.binding.whole(batch), self.binding.target(batch)), "loss")
                return found
            # a step may write to its batch, or ask for a gradient by it
            batch = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in batch.items()}
            clock = self.prepared.clock
            context = Context(device, clock.step, clock.epoch, True, self.work.settings.seed, take)
            loss, _ = split_logged(step(self.model, batch, context))
            if not found:
                take(loss, "loss")
        return found

    def backward(self, batch: Batch, each: Callable[[Tensor], None] | None = None) -> dict[str, Tensor]:
        """Leave the gradients of one batch's losses in ``.grad``, from none; the losses, detached.

        ``each`` is called with each loss before its backward.
        """
        gradients.clear(self.model.parameters())
        vars(self).pop("output", None)  # batch statistics may move with it

        def take(loss: Tensor) -> None:
            if each is not None:
                each(loss)
            if loss.requires_grad:
                gradients.backward(loss)

        return {name: loss.detach() for name, loss in self.losses(batch, take).items()}

    @cached_property
    def first_pass(self) -> FirstPass:
        """Forward and backward of ``few`` as a training does it, looked at on the way; gradients are cleared again."""
        seen = FirstPass()
        owned = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        began = time.perf_counter()
        with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            warnings.simplefilter("ignore")  # a training says them again
            seen.losses = self.backward(self.few, seen.roots.append)
        if self.prepared.device.type == "cuda":
            torch.cuda.synchronize(self.prepared.device)
        seen.seconds, seen.activation_bytes = time.perf_counter() - began, sum(held.values())
        seen.without_gradient = {name for name, p in self.parameters if p.grad is None}
        found = {name: p.grad for name, p in self.parameters if p.grad is not None}
        seen.not_finite = {name for name, gradient in found.items() if not is_finite(gradient)}
        gradients.clear(self.model.parameters())
        return seen

    @cached_property
    def output(self) -> Any:
        """What the model makes of ``few`` in eval mode, without a graph."""
        with evaluating(self.model), gradients.none_needed():
            return self.forward(self.few)

    def batches(self, count: int) -> Iterator[Batch]:
        """The first batches of an epoch, on the device; of what cannot be rewound only the one at hand."""
        foreign = foreign_of(self.work.train)
        if isinstance(self.work.train, Stream) or (foreign is not None and not foreign.probe.repeatable):
            yield self.batch
            return
        with contextlib.closing(self.prepared.shuffled_loader()) as loader:
            for batch in itertools.islice(loader, count):
                yield self.prepared.mover(batch)


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
