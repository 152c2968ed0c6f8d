"""What the steps leave on the device, brought from there in one vector for many steps at once (law 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from .step import StepResult

Clock = dict[str, int]


@dataclass
class LogPoint:
    """What belongs together: the steps up to here since the log point before. ``extras`` are means over those."""

    clock: Clock
    rates: dict[str, float]
    loss_sum: float = 0.0
    samples: int = 0
    extras: dict[str, float] = field(default_factory=dict)


@dataclass
class Window:
    """The steps that no log point has closed yet, and what is still on the device or on its way from it.

    ``num_waits`` counts how often the trainer has waited for the device.
    """

    values: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    extras: dict[str, list[float]] = field(default_factory=dict)
    num_waits: int = 0
    _results: list[StepResult] = field(default_factory=list)
    _indices: list[list[Tensor]] = field(default_factory=list)
    _marks: list[tuple[int, Clock, dict[str, float]]] = field(default_factory=list)
    _sent: _Sent | None = None

    def add(self, result: StepResult, indices: list[Tensor]) -> None:
        self._results.append(result)
        self._indices.append(indices)

    def mark(self, clock: Clock, rates: dict[str, float]) -> None:
        """A log point: costs nothing on the device."""
        self._marks.append((len(self._results), clock, rates))

    def read(self, step: int, wait: bool = True) -> list[LogPoint]:
        """Send for what lies on the device, and give the log points whose numbers are here.

        Without ``wait`` a GPU's numbers are taken at the next call, when they have long arrived.

        Raises:  NonFiniteLossError naming the first step whose loss is not a number, and its samples
        """
        closed = self._arrived()
        if self._results or self._marks:
            self._sent = _Sent(self._results, self._indices, self._marks, step)
            self._results, self._indices, self._marks = [], [], []
        if wait or (self._sent is not None and self._sent.is_here()):
            closed += self._arrived()
        return closed

    def _arrived(self) -> list[LogPoint]:
        sent, self._sent = self._sent, None
        if sent is None:
            return []
        self.num_waits += not sent.is_here()
        losses, extras = sent.numbers()
        closed, begin = [], 0
        for end, clock, rates in sent.marks:
            if end == begin + 1 and not self.values:  # a log point each step: what it has logged is its mean
                samples = sent.results[begin].samples
                closed.append(LogPoint(clock, rates, losses[begin] * samples, samples, extras[begin]))
            else:
                self._take(sent.results[begin:end], losses[begin:end], extras[begin:end])
                closed.append(self._close(clock, rates))
            begin = end
        self._take(sent.results[begin:], losses[begin:], extras[begin:])
        return closed

    def _close(self, clock: Clock, rates: dict[str, float]) -> LogPoint:
        total = sum(v * n for v, n in zip(self.values, self.counts, strict=True))
        means = {name: sum(values) / len(values) for name, values in self.extras.items()}
        closed = LogPoint(clock, rates, total, sum(self.counts), means)
        self.values, self.counts, self.extras = [], [], {}
        return closed

    def _take(self, results: list[StepResult], losses: list[float], extras: list[dict[str, float]]) -> None:
        self.values += losses
        self.counts += [result.samples for result in results]
        for row in extras:
            for name, value in row.items():
                self.extras.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        """What ``read`` has left; to be taken after it."""
        return {"values": list(self.values), "counts": list(self.counts), "extras": dict(self.extras)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.counts, self.extras = state["values"], state["counts"], state["extras"]


class _Sent:
    """The numbers of some steps on their way from the device: one vector, one copy."""

    def __init__(
        self, results: list[StepResult], indices: list[list[Tensor]], marks: list[Any], step: int
    ):  # fmt: skip
        self.results, self.marks = results, marks
        self._indices, self._step = indices, step
        numbers = [result.loss for result in results]
        self._counts = []
        for result in results:
            tensors = [value for value in result.extras.values() if isinstance(value, Tensor)] if result.extras else []
            numbers += tensors
            self._counts.append(len(tensors))
        self._host, self._event = _send(numbers)

    def is_here(self) -> bool:
        return self._event is None or bool(self._event.query())

    def numbers(self) -> tuple[list[float], list[dict[str, float]]]:
        """Of each step its loss and what else it has logged.

        Raises:  NonFiniteLossError
        """
        if self._event is not None:
            self._event.synchronize()
        found = self._host.tolist()
        losses = found[: len(self.results)]
        for number, value in enumerate(losses):
            if not math.isfinite(value):
                bad = self._step - len(losses) + number + 1
                raise _non_finite(value, bad, self._indices[number])
        extras, place = [], len(losses)
        for result, count in zip(self.results, self._counts, strict=True):
            extras.append(_read(result.extras or {}, found[place : place + count]))
            place += count
        return losses, extras


def _read(extras: dict[str, Tensor | float], numbers: list[float]) -> dict[str, float]:
    """What a step has logged, with the numbers that came from the device in place of its tensors."""
    if not numbers:
        return extras  # type: ignore[return-value]  # all are numbers already
    if len(numbers) == len(extras):
        return dict(zip(extras, numbers, strict=True))
    rest = iter(numbers)
    return {name: next(rest) if isinstance(value, Tensor) else value for name, value in extras.items()}


def _send(numbers: list[Tensor]) -> tuple[Tensor, Any]:
    """One vector of all numbers on the host, and what tells when it is there: None where it is already."""
    if not numbers:
        return torch.empty(0), None
    kinds = set(map(_dtype_of, numbers))
    if len(kinds) > 1 or not numbers[0].is_floating_point():
        wide = torch.float32 if numbers[0].device.type == "mps" else torch.float64
        numbers = [number.to(numbers[0].device, wide) for number in numbers]
    packed = torch.stack(numbers)
    if packed.device.type != "cuda":
        return packed.cpu(), None
    host = torch.empty_like(packed, device="cpu", pin_memory=True)
    host.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


_dtype_of = attrgetter("dtype")


def samples_text(indices: list[Tensor]) -> str:
    ids = [number for index in indices for number in index.tolist()]
    return "samples " + ", ".join(map(str, ids[:16])) + (f" … ({len(ids)} in all)" if len(ids) > 16 else "")


def _non_finite(value: float, step: int, indices: list[Tensor]) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the loss became {value}",
        where=f"step {step}",
        got=samples_text(indices),
        expected="a finite loss",
        fix="a lower optimizer.learning_rate, train.clip_norm = 1.0, or tk.trace_backward with the last good "
        "checkpoint and these samples, which names the operation",
    )
