"""How true probabilities are, and the one number that makes them truer: the temperature that logits are divided by."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Json
from ..training.objective import IGNORED

BINS = 15
_FEWEST = 20
_COLDEST, _HOTTEST = 0.05, 20.0
_SEARCHES = 60  # golden sections: each leaves .618 of the interval, all of them 1e-12


def calibrated(logits: Tensor, labels: Tensor, loss: str) -> Json:
    """The temperature at which the negative log-likelihood is least; empty where nothing can be said of it.

    Shapes:  logits (N, K) or, with the loss "binary_cross_entropy", (N,), (N, 1) or (N, K); labels alike, or (N,)
    Units:   nll in nats, ece as a share of 1, before and after
    Source:  Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599), sections 2 and 4.2
    """
    is_binary = loss == "binary_cross_entropy"
    logits = logits.double()
    if is_binary:
        logits, labels = logits.reshape(len(logits), -1), labels.reshape(len(labels), -1).double()
    kept = torch.isfinite(logits).all(1) & ((labels >= 0).all(1) if is_binary else labels != IGNORED)
    logits, labels = logits[kept], labels[kept]
    if len(logits) < _FEWEST or logits.shape[1:] == (0,) or bool((labels == labels[0]).all()):
        return {}

    def nll(temperature: float) -> float:
        scaled = logits / temperature
        told = F.binary_cross_entropy_with_logits(scaled, labels) if is_binary else F.cross_entropy(scaled, labels)
        return float(told)

    temperature = _least(nll)
    found = {"temperature": temperature, "samples": len(logits)}
    for when, at in (("before", 1.0), ("after", temperature)):
        sure, right = _answers(logits / at, labels, is_binary)
        found |= {f"nll_{when}": nll(at), f"ece_{when}": expected_error(sure, right)}
    return found


def _least(cost: Callable[[float], float]) -> float:
    """Where a cost that is convex in 1 / T is least, by golden sections."""
    share = (5**0.5 - 1) / 2
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = cost(1 / left), cost(1 / right)
    for _ in range(_SEARCHES):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = cost(1 / left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = cost(1 / right)
    return round(2 / (low + high), 6)


def _answers(logits: Tensor, labels: Tensor, is_binary: bool) -> tuple[Tensor, Tensor]:
    """The probability of each answer, and whether it is right, (N,) each."""
    if is_binary:
        p = logits.sigmoid().flatten()
        return torch.maximum(p, 1 - p), (p > 0.5) == (labels.flatten() > 0.5)
    sure, answer = logits.softmax(1).max(1)
    return sure, answer == labels


def bins_of(sure: Tensor, right: Tensor) -> list[tuple[int, float, float]]:
    """For each of 15 equal bins of probability: how many answers, their mean probability, the share that is right."""
    place = (sure * BINS).long().clamp(0, BINS - 1)
    rows = [(place == number) for number in range(BINS)]
    return [(int(row.sum()), float(sure[row].mean()), float(right[row].double().mean())) if row.any() else (0, 0.0, 0.0)
            for row in rows]  # fmt: skip


def expected_error(sure: Tensor, right: Tensor) -> float:
    """The expected calibration error: the mean gap between probability and share that is right, by bins."""
    rows = bins_of(sure, right)
    return sum(count * abs(p - share) for count, p, share in rows) / max(len(sure), 1)
