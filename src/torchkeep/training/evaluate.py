"""One pass over a split: the mean loss and the metrics, with nothing of the training changed by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import gradients
from ..contracts import INDEX, Batch, Json
from ..data.loader import Loader
from ..errors import LabelError
from ..generators import kept_generators
from ..model.freeze import evaluating
from .binding import Binding
from .contract import refuse_misfit
from .device import Mover, autocast
from .metrics import Adapted, Metric
from .objective import Objective, prediction_of
from .optim import Average
from .step import Stepper, UserStep, split_logged


class Gathers(Protocol):
    """What looks at each batch of an evaluation beside the metrics."""

    def add(self, batch: Batch, output: Any, target: Any) -> None: ...


class Evaluation:
    """Evaluates the model as it is now, with its moving average where there is one.

    ``evaluation(loader, "valid")`` → ``{"valid/loss": …, "valid/accuracy": …}``
    """

    def __init__(
        self, binding: Binding, objective: Objective, mover: Mover, metrics: Sequence[Metric | Adapted], *,
        precision: str = "fp32", average: Average | None = None, user_step: UserStep | None = None,
        stepper: Stepper | None = None, contract: Json = None,
    ):  # fmt: skip
        self._binding, self._objective, self._mover = binding, objective, mover
        self._metrics, self._precision, self.average = metrics, precision, average
        self._user_step, self._stepper, self._contract = user_step, stepper, contract

    def __call__(self, loader: Loader, split: str, seen: Gathers | None = None) -> dict[str, float]:
        """Loss and metrics of a split. ``seen`` gathers what is to be shown of it."""
        self._seen = seen
        loader.rewind()
        for metric in self._metrics:
            metric.reset()
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        if self.average is not None:
            self.average.swap()
        try:
            with kept_generators(), evaluating(self._binding.model), gradients.none_needed():
                for batch in loader:
                    loss, count = self._checked(batch, split)
                    losses.append(loss)
                    counts.append(torch.as_tensor(count, device=loss.device))
        finally:
            if self.average is not None:
                self.average.swap()
        measured = {metric.name: metric.compute() for metric in self._metrics if metric.has_seen}
        return {f"{split}/{name}": value for name, value in {"loss": _mean(losses, counts), **measured}.items()}

    def _measure(self, batch: Batch) -> tuple[Tensor, int | Tensor]:
        """The loss, and how many targets it is the mean of: the split's loss is no matter of the batch size."""
        moved, size = self._mover(batch), len(batch[INDEX])
        with autocast(self._precision, self._mover.device):
            if self._user_step is not None:
                return self._own(self._user_step, moved), size
            output = self._binding.call(moved)
            target = self._binding.target(moved)
            loss = self._objective(output, target)
        self._note(batch, prediction_of(output), target)
        return loss, self._objective.count(target, size)

    _seen: Gathers | None = None

    def _note(self, batch: Batch, output: Any, target: Any) -> None:
        for metric in self._metrics:
            metric.update(output, target)
        if self._seen is not None:
            self._seen.add(batch, output, target)

    def _checked(self, batch: Batch, split: str) -> tuple[Tensor, int | Tensor]:
        try:
            return self._measure(batch)
        except LabelError as error:
            error.where = f"split {split}, samples {batch[INDEX][error.rows].tolist()[:16]}"
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            refuse_misfit(error, self._contract, batch, f"split {split}, samples {batch[INDEX].tolist()[:16]}")
            raise

    def _own(self, user_step: UserStep, batch: Batch) -> Tensor:
        assert self._stepper is not None
        logged = user_step(self._binding.model, batch, self._stepper.context(training=False))
        loss, _ = split_logged(logged)
        if isinstance(logged, dict) and "output" in logged and "target" in logged:
            self._note(batch, prediction_of(logged["output"]), logged["target"])
        return loss


def _mean(losses: list[Tensor], counts: list[Tensor]) -> float:
    values = torch.stack(losses).cpu().double().tolist()
    shares = torch.stack(counts).cpu().double().tolist()
    counted = [(value, share) for value, share in zip(values, shares, strict=True) if share]
    return sum(value * share for value, share in counted) / sum(shares) if counted else float("nan")
