"""Metrics that stay on the device until a log point reads them. Any torchmetrics object fits beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SettingsError, nearest
from .objective import IGNORED, aligned, classes_are_last

_TOP = re.compile(r"top(\d+)")


class Metric:
    """A sum over samples that ends in a number.

    ``_measure(output, target)`` gives a vector to be added up; ``_finish(total)`` makes the number of it.
    """

    def __init__(self, name: str):
        self.name = self.kind = name
        self._total: Tensor | None = None

    @property
    def has_seen(self) -> bool:
        """Whether anything was added."""
        return self._total is not None

    def reset(self) -> None:
        self._total = None

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch. Shapes: output (B, …), target (B, …)"""
        measured = self._measure(output.detach(), target)
        # what a resume has loaded lies on the CPU
        self._total = measured if self._total is None else self._total.to(measured.device).add_(measured)

    def compute(self) -> float:
        """The number, read from the device; NaN where nothing was added."""
        return float("nan") if self._total is None else self._finish(self._total.cpu().double())

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total = state["total"]

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("a metric says what it measures")

    def _finish(self, total: Tensor) -> float:
        return float(total[0] / total[1]) if float(total[1]) else float("nan")


class Accuracy(Metric):
    """The share of right classes. Shapes: logits (B, K, …) or one logit (B,) or (B, 1) for two classes."""

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        classes, truth = classes_of(output, target)
        return torch.stack([(classes == truth).sum(), (truth != IGNORED).sum()])


class TopK(Metric):
    """The share of samples whose class is among the k most likely."""

    def __init__(self, k: int):
        super().__init__(f"top{k}")
        self.k = k

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        best = output.topk(min(self.k, output.shape[1]), dim=1).indices
        return torch.stack([(best == target.unsqueeze(1)).sum(), (target != IGNORED).sum()])


class ClassCounts(Metric):
    """F1, precision or recall: the mean over classes that occur (macro), or of the positive class where each target
    has one logit. Source: Manning, Raghavan, Schütze 2008, sections 8.3 and 13.6.
    """

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        classes, truth = classes_of(output, target)
        self._is_binary = output.ndim == target.ndim or output.shape[1] == 1
        count = 2 if self._is_binary else output.shape[1]
        kept = truth != IGNORED
        cells = (truth[kept] * count + classes[kept]).flatten()
        table = torch.zeros(count * count, dtype=torch.int64, device=output.device)
        return table.index_add_(0, cells, torch.ones_like(cells))

    def _finish(self, total: Tensor) -> float:
        size = int(len(total) ** 0.5)
        table = total.view(size, size)
        hit, true, said = table.diagonal(), table.sum(1), table.sum(0)
        if self.kind == "precision":
            values = hit / said.clamp(min=1)
        elif self.kind == "recall":
            values = hit / true.clamp(min=1)
        else:
            values = 2 * hit / (true + said).clamp(min=1)
        if self._is_binary:
            return float(values[1])
        occurs = (true + said) > 0
        return float(values[occurs].mean()) if bool(occurs.any()) else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_binary": getattr(self, "_is_binary", False)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._is_binary = state["is_binary"]


class MeanAbsoluteError(Metric):
    """The mean of |output - target|, in the target's unit."""

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        error = (aligned(output, target).float() - target.float()).abs().sum()
        return torch.stack([error, error.new_tensor(target.numel())])


class RSquared(Metric):
    """The share of the targets' variance that is predicted: 1 - Σ(target - output)² / Σ(target - mean)²."""

    def _measure(self, output: Tensor, target: Tensor) -> Tensor:
        output = aligned(output, target)
        if target.device.type == "mps":  # which has no float64, and squares of large numbers need it
            output, target = output.cpu(), target.cpu()
        truth, said = target.double().flatten(), output.double().flatten()
        return torch.stack(
            [truth.new_tensor(len(truth)), truth.sum(), truth.square().sum(), (truth - said).square().sum()]
        )

    def _finish(self, total: Tensor) -> float:
        count, first, second, error = total.tolist()
        spread = second - first * first / count
        return 1 - error / spread if spread > 0 else float("nan")


class Adapted:
    """A torchmetrics object, or anything with update, compute and reset."""

    def __init__(self, name: str, metric: Any):
        self.name = name
        self._metric = metric
        self.has_seen = False

    def reset(self) -> None:
        self.has_seen = False
        self._metric.reset()

    def update(self, output: Tensor, target: Tensor) -> None:
        if hasattr(self._metric, "to") and getattr(self._metric, "device", output.device) != output.device:
            self._metric.to(output.device)
        self.has_seen = True
        self._metric.update(output.detach(), target)

    def compute(self) -> float:
        value = self._metric.compute()
        if isinstance(value, Tensor) and value.numel() != 1:
            raise SettingsError(
                "this metric gives more than one number", where=f"metrics: {self.name}", got=tuple(value.shape)
            )
        return float(value)

    def state_dict(self) -> dict[str, Any]:
        # torchmetrics keeps its sums out of state_dict() unless asked
        names = list(getattr(self._metric, "_defaults", {}))
        return {name: getattr(self._metric, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._metric, name, value)


def classes_of(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted and the true classes, in one shape.

    Raises:  ModelError where the shapes cannot be those of classes
    """
    if output.ndim == target.ndim or (output.ndim == target.ndim + 1 and output.shape[1] == 1):
        return (aligned(output, target) > 0).long(), target.long()
    if classes_are_last(output, target):
        return output.argmax(2), target
    if output.ndim == target.ndim + 1:
        return output.argmax(1), target
    raise ModelError(
        "this metric needs classes", where="metrics",
        got=f"output {tuple(output.shape)}, target {tuple(target.shape)}", expected="output (B, K), target (B,)",
    )  # fmt: skip


_NAMED: dict[str, Callable[[str], Metric]] = {
    "accuracy": Accuracy,
    "f1": ClassCounts,
    "precision": ClassCounts,
    "recall": ClassCounts,
    "mean_absolute_error": MeanAbsoluteError,
    "r2": RSquared,
}


def check_metric_name(name: str) -> None:
    """Raises ValueError, for the settings, if there is no such metric."""
    if name != "loss" and name not in _NAMED and not _TOP.fullmatch(name):
        hint = nearest(name, list(_NAMED))
        raise ValueError(f"one of {', '.join(_NAMED)}, top5; not {name!r}{' - ' + hint if hint else ''}")


def make_metrics(given: Sequence[Any] | Mapping[str, Any]) -> list[Metric | Adapted]:
    """Metrics by name, or objects with update, compute and reset; a dict names the objects.

    Raises:  SettingsError for what is neither, and for two of one name
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, item) for item in given]
    made = [_make(name, item) for name, item in pairs if not isinstance(item, str) or item != "loss"]
    names = [metric.name for metric in made]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(
            "two metrics have one name", where="metrics", got=", ".join(names), expected=f"one {twice[0]!r}",
            fix='metrics={"first": …, "second": …} names them',
        )  # fmt: skip
    return made


def _make(name: str | None, item: Any) -> Metric | Adapted:
    if isinstance(item, str):
        try:
            check_metric_name(item)
        except ValueError as error:
            raise SettingsError("there is no such metric", where="metrics", got=repr(item), expected=error) from None
        match = _TOP.fullmatch(item)
        metric = TopK(int(match[1])) if match else _NAMED[item](item)
        metric.name = name or metric.name
        return metric
    if all(hasattr(item, verb) for verb in ("update", "compute", "reset")):
        return Adapted(name or _snake(type(item).__name__), item)
    raise SettingsError(
        "this is no metric", where="metrics", got=type(item).__name__,
        expected="a name, or an object with update, compute and reset",
    )  # fmt: skip


def _snake(name: str) -> str:
    plain = re.sub(r"^(Multiclass|Multilabel|Binary)", "", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plain).lower()
