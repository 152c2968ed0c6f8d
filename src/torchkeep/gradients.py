"""The only place that calls backward, and that measures and clips gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None = None, weight: float | Tensor | None = None) -> None:
    """Add the gradients of ``loss`` to ``.grad``.

    ``weight`` is this micro-batch's share of the step, so that the sum over micro-batches is the whole batch's mean.

    Shapes:  loss ()
    """
    if weight is not None:
        loss = loss * weight
    if scaler is not None:
        loss = scaler.scale(loss)
    loss.backward()  # type: ignore[no-untyped-call]


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most ``max_norm``; the norm before, on the device.

    Source:  Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1
    """
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm


def norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The joint 2-norm of all gradients, on the device."""
    found: Tensor = nn.utils.get_total_norm([numbers_of(p.grad) for p in parameters if p.grad is not None])
    return found


def numbers_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, also of a sparse one, as of nn.Embedding(sparse=True)."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def clear(parameters: Iterable[nn.Parameter]) -> None:
    """Forget all gradients. None rather than zeros: the next backward then writes instead of adding."""
    for parameter in parameters:
        parameter.grad = None


def none_needed() -> Any:
    """The context in which evaluation runs."""
    # not inference_mode: a cache that a model fills meanwhile could never be trained through again
    return torch.no_grad()
