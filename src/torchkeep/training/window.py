"""What the steps since the last log point have left on the device, read once for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from .step import StepResult


@dataclass
class Window:
    """The steps since the last log point: their losses, still on the device, and their samples."""

    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    extras: dict[str, list[float]] = field(default_factory=dict)
    _losses: list[Tensor] = field(default_factory=list)
    _extras: list[dict[str, Tensor]] = field(default_factory=list)
    _indices: list[list[Tensor]] = field(default_factory=list)

    def add(self, result: StepResult, indices: list[Tensor]) -> None:
        self._losses.append(result.loss)
        self._indices.append(indices)
        self.counts.append(result.samples)
        if result.extras:
            self._extras.append(result.extras)

    def read(self, step: int) -> None:
        """Bring the losses from the device: the only wait between two log points.

        Raises:  NonFiniteLossError naming the first step whose loss is not a number, and its samples
        """
        if not self._losses:
            return
        values = torch.stack(self._losses).cpu().double().tolist()
        for number, value in enumerate(values):
            if not math.isfinite(value):
                bad = step - len(values) + number + 1
                raise _non_finite(value, bad, self._indices[number])
        self.values += values
        for name in dict.fromkeys(name for row in self._extras for name in row):
            read = torch.stack([row[name].float() for row in self._extras if name in row]).cpu().tolist()
            self.extras.setdefault(name, []).extend(read)
        self._losses, self._extras, self._indices = [], [], []

    def sums(self) -> tuple[float, int]:
        """The loss summed over samples, and the samples. The same whenever the values were read."""
        return sum(v * n for v, n in zip(self.values, self.counts, strict=True)), sum(self.counts)

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "counts": list(self.counts), "extras": dict(self.extras)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.counts, self.extras = state["values"], state["counts"], state["extras"]


def samples_text(indices: list[Tensor]) -> str:
    ids = [number for index in indices for number in index.tolist()]
    return "samples " + ", ".join(map(str, ids[:16])) + (f" … ({len(ids)} in all)" if len(ids) > 16 else "")


def _non_finite(value: float, step: int, indices: list[Tensor]) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the loss became {value}",
        where=f"step {step}",
        got=samples_text(indices),
        expected="a finite loss",
        fix="a lower optimizer.learning_rate, train.clip_norm = 1.0, or a look at these samples; "
        "the last good checkpoint stays",
    )
