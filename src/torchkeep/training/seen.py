"""What an evaluation shows besides numbers: some samples with truth and output, the confusion, precision and recall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import INDEX, Batch, Json
from ..watch.curves import curves, score_counts
from .metrics import ClassCounts

_MOST_CLASSES = 100
_MOST_CURVES = 10


class Seen:
    """Gathers on the device while an evaluation goes on; read once at its end.

    ``indices`` (N,) int64, ``outputs`` (N, …) and ``truths`` (N, …) are those of its first ``most`` samples, None where
    output or target are no single tensor.
    """

    def __init__(self, most: int):
        self.most = most
        self.indices: Tensor | None = None
        self.outputs: Tensor | None = None
        self.truths: Tensor | None = None
        self._counts = ClassCounts("confusion")
        self._curves: Tensor | None = None

    def add(self, batch: Batch, output: Any, target: Any) -> None:
        """Take a batch in. Shapes: output (B, …), target (B, …); anything else is left out."""
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return
        self._hold(batch[INDEX], output.detach(), target)
        if target.ndim != 1 or output.ndim > 2:
            return
        num_classes = 2 if output.ndim == 1 or output.shape[1] == 1 else output.shape[1]
        if num_classes <= _MOST_CLASSES and (num_classes == 2 or not target.is_floating_point()):
            if output.ndim == 2 and output.shape[1] > 1:
                self._counts.update(output, target)
            if num_classes <= _MOST_CURVES and not target.is_floating_point():
                self._add_curves(output.detach(), target)

    def _hold(self, index: Tensor, output: Tensor, target: Tensor) -> None:
        held = 0 if self.indices is None else len(self.indices)
        if held >= self.most or len(output) != len(target):
            return
        few = slice(0, self.most - held)
        new = [index[few].cpu(), output[few].clone(), target[few].clone()]
        if self.indices is None or self.outputs is None or self.truths is None:
            self.indices, self.outputs, self.truths = new
        elif self.outputs.shape[1:] == new[1].shape[1:] and self.truths.shape[1:] == new[2].shape[1:]:
            parts = zip((self.indices, self.outputs, self.truths), new, strict=True)
            self.indices, self.outputs, self.truths = (torch.cat(pair) for pair in parts)

    def _add_curves(self, output: Tensor, target: Tensor) -> None:
        if output.ndim == 1 or output.shape[1] == 1:
            score = output.reshape(-1).float().sigmoid()
            scores = torch.stack([1 - score, score], 1)
        else:
            scores = output.float().softmax(1)
        kept = (target >= 0) & (target < scores.shape[1]) & scores.isfinite().all(1)
        is_true = torch.nn.functional.one_hot(target[kept].long(), scores.shape[1])
        counts = score_counts(scores[kept], is_true)
        self._curves = counts if self._curves is None else self._curves.add_(counts)

    def confusion(self) -> list[list[int]] | None:
        """Counts by truth and output; None where there are no classes, or too many to read."""
        if not self._counts.has_seen:
            return None
        total = self._counts.state_dict()["total"]
        size = int(len(total) ** 0.5)
        counts: list[list[int]] = total.view(size, size).tolist()
        return counts

    def curves(self) -> list[dict[str, Json]]:
        """Of each class its precision and recall; empty where they are unknown."""
        return [] if self._curves is None else curves(self._curves)
