"""What an evaluation shows besides numbers: some samples with truth and output, the confusion, precision and recall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contracts import INDEX, Batch, Json
from ..errors import ModelError
from ..watch.curves import curves, score_counts
from .metrics import ClassCounts

_MOST_CLASSES = 100
_MOST_CURVES = 10


class Seen:
    """Gathers on the device while an evaluation goes on; read once at its end.

    ``held`` has of ``most`` samples, one in ``stride``, "index" (N,), "output" (N, …) and "truth" (N, …), and under
    "shown" what the batches have at the key ``shown``, as read; empty where output or target are no single tensor.
    """

    def __init__(self, most: int, shown: str | None = None, stride: int = 1):
        self.most, self._stride = most, stride
        self._passed = 0
        self.held: dict[str, Tensor] = {}
        self._shown = shown
        self._counts = ClassCounts("confusion")
        self._curves: Tensor | None = None

    def add(self, batch: Batch, output: Any, target: Any) -> None:
        """Take a batch in. Shapes: output (B, …), target (B, …); anything else is left out.

        What it cannot count, as a step of one's own may give, ends the gathering and never the evaluation.
        """
        if self._is_off or not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return
        try:
            self._add(batch, output, target)
        except (RuntimeError, IndexError, ValueError, ModelError):
            self._is_off, self.held, self._curves = True, {}, None
            self._counts.reset()

    _is_off = False

    def _add(self, batch: Batch, output: Tensor, target: Tensor) -> None:
        parts = {"index": batch[INDEX], "output": output.detach(), "truth": target}
        shown = batch.get(self._shown) if self._shown else None
        self._hold(parts | ({"shown": shown} if isinstance(shown, Tensor) else {}))
        if target.ndim != 1 or output.ndim > 2:
            return
        num_classes = 2 if output.ndim == 1 or output.shape[1] == 1 else output.shape[1]
        if num_classes <= _MOST_CLASSES and (num_classes == 2 or not target.is_floating_point()):
            if output.ndim == 2 and output.shape[1] > 1:
                self._counts.update(output, target)
            if num_classes <= _MOST_CURVES and not target.is_floating_point():
                self._add_curves(output.detach(), target)

    def _hold(self, parts: dict[str, Tensor]) -> None:
        room = self.most - (len(self.held["index"]) if self.held else 0)
        first = -self._passed % self._stride
        self._passed += len(parts["index"])
        if room <= 0 or first >= len(parts["index"]) or len({len(part) for part in parts.values()}) > 1:
            return
        new = {name: part[first :: self._stride][:room].clone() for name, part in parts.items()}
        if not self.held:
            self.held = new
        elif self.held.keys() == new.keys() and all(self.held[k].shape[1:] == new[k].shape[1:] for k in new):
            self.held = {name: torch.cat([part, new[name]]) for name, part in self.held.items()}

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
