"""The loss: by name, as a module or as a callable; and what of an output is the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import Field
from ..errors import LabelError, ModelError, SettingsError, nearest
from ..model.describe import shape_text
from .binding import Binding

Loss = Callable[..., Tensor]
IGNORED = -100  # torch's own label for "no target here"


def prediction_of(output: Any) -> Any:
    """The logits or numbers of an output: itself, its ``.logits``, its first part."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return logits
    return output[0] if isinstance(output, tuple | list) and output else output


def own_loss_of(output: Any) -> Tensor | None:
    """The loss that a model has put into its output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


class Objective:
    """``objective(output, target)`` → loss (); ``count(target, batch_size)`` → how many targets it is the mean of."""

    def __init__(self, name: str, loss: Loss | None):
        self.name = name
        self._loss = loss

    def __call__(self, output: Any, target: Any) -> Tensor:
        if self._loss is None:
            return self._from_output(output)
        try:
            if self.name == "own":
                loss = self._loss(output) if target is None else self._loss(output, target)
                return loss if loss.ndim == 0 else loss.reshape(())
            return self._loss(prediction_of(output), target)
        except IndexError as error:
            raise _label_error(prediction_of(output), target, error) from error

    def _from_output(self, output: Any) -> Tensor:
        loss = own_loss_of(output)
        if loss is None:
            raise ModelError(
                "this model's output has no .loss", where="loss", got=shape_text(output) or type(output).__name__,
                expected="an output with .loss, or a target in the batch and a loss",
                fix='loss="cross_entropy", or any function (output, target) → loss',
            )  # fmt: skip
        return loss

    def count(self, target: Any, batch_size: int) -> int | Tensor:
        """How many targets the loss is the mean of, each by its class's weight; those that are ignored do not count."""
        if not isinstance(target, Tensor):
            return batch_size
        if self.name in ("mse", "binary_cross_entropy"):
            return target.numel()
        is_cross_entropy = isinstance(self._loss, _CrossEntropy | nn.CrossEntropyLoss)
        if target.is_floating_point():
            return target.numel() // target.shape[1] if is_cross_entropy and target.ndim > 1 else batch_size
        if not is_cross_entropy and target.ndim < 2:
            return batch_size
        kept = target != getattr(self._loss, "ignore_index", IGNORED)
        weight = getattr(self._loss, "weight", None) if is_cross_entropy else None
        if weight is None:
            return kept.sum()
        counted: Tensor = (weight.to(target.device)[target.where(kept, 0)] * kept).sum()
        return counted

    def adds_up(self, output: Any, target: Any) -> bool:
        """Whether each sample's output adds a part of its own to the loss, as far as these outputs tell.

        Where it does, other outputs for two halves of a batch change the loss by as much together as one by one.
        """
        if self.name != "own" or not isinstance(output, Tensor):
            return True
        if output.shape[:1] != target.shape[:1]:  # a model that gives its loss, or a score of the batch
            return False
        output, half = output.float(), len(output) // 2  # few bits of a loss would not show it
        other = output.roll(1, 0)
        halves = [(a, b) for a in (output, other) for b in (output, other)]
        try:
            with torch.autocast(output.device.type, enabled=False):
                losses = [self(torch.cat([a[:half], b[half:]]), target).double() for a, b in halves]
        except RuntimeError:  # a loss that differentiates by itself: there is no graph in this first look
            return True
        own, second, first, both = losses
        return torch.allclose(own + both, first + second, rtol=1e-4, atol=1e-5)


def choose_objective(
    loss: Any, binding: Binding, batch_target: Any, class_weights: list[float] | None, label_smoothing: float,
    field: Field | None = None,
) -> tuple[Objective, str]:  # fmt: skip
    """The objective, and the reason where it was chosen. ``field`` says what the target is, where the data know.

    A squared error is divided by the variance of the training targets where that is known: 1 is the loss of their mean.

    Raises:  SettingsError for an unknown name, or for settings that only cross_entropy has
    """
    if callable(loss):
        _only_cross_entropy("own", class_weights, label_smoothing)
        if isinstance(loss, nn.Module):
            loss.to(next((p.device for p in binding.model.parameters()), None))
        return Objective("own", loss), "as given"
    name, reason = (loss, "as set") if loss not in (None, "auto") else _name_for(binding, batch_target, field)
    if name not in _NAMED:
        raise SettingsError(
            "there is no such loss", where="train.loss", got=repr(loss),
            expected=f"one of {', '.join(_NAMED)}, or a callable in Python", fix=nearest(str(loss), list(_NAMED)),
        )  # fmt: skip
    if name != "cross_entropy":
        _only_cross_entropy(name, class_weights, label_smoothing)
    if name == "output.loss":
        return Objective(name, None), reason
    if name == "cross_entropy":
        weight = torch.tensor(class_weights) if class_weights else None
        return Objective(name, _CrossEntropy(weight, label_smoothing)), reason
    if name == "mse" and field is not None and field.std != 1.0:
        variance = field.std**2
        reason += f"; divided by its variance {variance:.4g}"
        return Objective(name, lambda output, target: _mean_squared_error(output, target) / variance), reason
    return Objective(name, _NAMED[name]), reason


def _name_for(binding: Binding, target: Any, field: Field | None) -> tuple[str, str]:
    if binding.makes_own_loss():
        return "output.loss", "the model takes the targets itself"
    if field is not None and field.kind == "multilabel":
        return "binary_cross_entropy", "a sample may have several classes"
    if isinstance(target, Tensor):
        if target.is_floating_point():
            return "mse", "the target is a number"
        return "cross_entropy", "the target is a class"
    return "output.loss", "there is no target"


def _only_cross_entropy(name: str, class_weights: list[float] | None, label_smoothing: float) -> None:
    if class_weights or label_smoothing:
        raise SettingsError(
            "class weights and label smoothing belong to cross_entropy",
            where="train.class_weights" if class_weights else "train.label_smoothing",
            got=f"loss {name}",
            expected="cross_entropy",
        )


def classes_are_last(output: Tensor, target: Tensor) -> bool:
    """Whether an output is (B, T, K), as language models give it, and not (B, K, T)."""
    return output.ndim == 3 and output.shape[:2] == target.shape


def _label_error(output: Any, target: Any, error: IndexError) -> Exception:
    """What torch calls "Target 7 is out of bounds", with the rows of the batch; another error as it is."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return error
    if output.ndim < 2 or target.is_floating_point():
        return error
    count = output.shape[-1 if classes_are_last(output, target) else 1]
    wrong = ((target >= count) | ((target < 0) & (target != IGNORED))).reshape(len(target), -1).any(1)
    rows = wrong.nonzero().flatten().tolist()
    if not rows:
        return error
    values = sorted({int(value) for value in target[wrong].flatten() if not 0 <= int(value) < count})
    return LabelError(
        "a label is outside the classes of the model", rows, got=f"label {', '.join(map(str, values[:10]))}",
        expected=f"0 to {count - 1}, as the model has {count} outputs",
        fix="mend the labels, or give the model as many outputs as there are classes",
    )  # fmt: skip


class _CrossEntropy(nn.Module):
    """Shapes:  logits (B, K, …) or (B, T, K), target int64 (B, …) or probabilities (B, K, …) → ()"""

    def __init__(self, weight: Tensor | None, label_smoothing: float):
        super().__init__()
        self.weight = weight
        self.label_smoothing = label_smoothing

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if output.dtype in (torch.bfloat16, torch.float16):  # what autocast left: a sum of exponentials needs more
            output = output.float()
        if self.weight is not None and (self.weight.device, self.weight.dtype) != (output.device, output.dtype):
            self.weight = self.weight.to(output.device, output.dtype)
        if classes_are_last(output, target):
            output = output.transpose(1, 2)
        return F.cross_entropy(output, target, self.weight, label_smoothing=self.label_smoothing)


def _binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    output = aligned(output, target)
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))


def _mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    output = aligned(output, target)
    return F.mse_loss(output, target.to(output.dtype))


def aligned(output: Tensor, target: Tensor) -> Tensor:
    """``output`` in the target's shape: (B, 1) becomes (B,).

    Raises:  ModelError where the shapes only broadcast: the mean over a (B, B) table is nobody's loss
    """
    if output.shape == target.shape:
        return output
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1 and output.shape[:-1] == target.shape:
        return output.squeeze(-1)
    raise ModelError(
        "the model's output and the target have different shapes", where="loss",
        got=f"output {tuple(output.shape)}", expected=f"target {tuple(target.shape)}",
    )  # fmt: skip


_NAMED: dict[str, Any] = {
    "cross_entropy": _CrossEntropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mean_squared_error,
    "output.loss": None,
}


def check_fit(
    objective: Objective, output: Any, target: Any, num_classes: int, where: str, is_exact: bool = True
) -> None:
    """Whether a first output can meet its targets, before anything is written.

    ``num_classes`` is how many classes the data have; where not ``is_exact``, they have at least so many.

    Raises:  ModelError with both shapes
    """
    prediction = prediction_of(output)
    if objective.name == "output.loss":
        objective(output, target)
        return
    if objective.name == "own":
        _check_own(objective, output, target, where)
        return
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        raise ModelError(
            "this loss needs one output and one target",
            where=where,
            got=f"output {shape_text(output) or type(output).__name__}, target {shape_text(target) or 'none'}",
            expected="tensors",
            fix="loss= takes any function (output, target) → loss; targets= names the target's key",
        )
    if objective.name == "cross_entropy":
        _check_classes(prediction, target, num_classes, where, is_exact)
    else:
        aligned(prediction, target)


def _check_own(objective: Objective, output: Any, target: Any, where: str) -> None:
    got = f"output {shape_text(output) or type(output).__name__}, target {shape_text(target) or 'none'}"
    try:
        objective(output, target)
    except Exception as error:
        if "grad" in str(error):  # a loss that differentiates by itself: there is no graph in this first look
            return
        raise ModelError(
            "the loss cannot take this output and this target",
            where=where,
            got=f"{type(error).__name__}: {error} - with {got}",
            expected="a function (output, target) → one number",
            fix="targets= names the target's keys; a loss gives a mean, so no reduction='none'",
        ) from error


def _check_classes(prediction: Tensor, target: Tensor, num_classes: int, where: str, is_exact: bool) -> None:
    classes_axis = -1 if classes_are_last(prediction, target) else 1
    if target.is_floating_point():
        fits = prediction.shape == target.shape
        got, expected = f"output {tuple(prediction.shape)}", f"target {tuple(target.shape)}"
    else:
        width = prediction.shape[classes_axis] if prediction.ndim > 1 else 0
        needed = max(num_classes, int(target.max()) + 1 if target.numel() else 0)
        fits = prediction.ndim == target.ndim + 1 and width >= needed and width > 0
        if is_exact and num_classes and width != num_classes:
            fits = False
        got = f"output {tuple(prediction.shape)} for target {tuple(target.shape)}"
        expected = f"{num_classes or needed} classes: (B, {num_classes or needed})"
    if not fits:
        raise ModelError(
            "the model's output does not fit the classes", where=where, got=got, expected=expected,
            fix="make the last layer as wide as there are classes (a recipe's function gets num_classes)",
        )  # fmt: skip
