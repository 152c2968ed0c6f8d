"""Batch normalisation folded into the convolution before it: a frozen forward passes over its memory once less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Forwards = dict[nn.Module, Callable[[Tensor], Tensor]]


def find_folds(model: nn.Module, run: Callable[[], Any]) -> Forwards:
    """Forwards in place of those of frozen convolutions, and of the normalisations that come right after them.

    ``run`` runs the frozen part once; modules that it calls more than once are left. That nothing else uses what a
    convolution gives is for the caller to see, by comparing results.

    Source:  Jacob et al. 2018 (arXiv 1712.05877), section 3.2
    """
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[Any, Any]] = []
    last: list[Any] = [None, None, None]  # the third keeps its memory from being given to another

    def after(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] += 1
        last[:] = conv, _place(output), output

    def before(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        conv, place, _ = last
        if place == _place(args[0]):
            pairs.append((conv, norm))

    frozen = [m for m in model.modules() if not any(p.requires_grad for p in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(after) for m in frozen if type(m) in _CONVS]
    hooks += [m.register_forward_pre_hook(before) for m in frozen if type(m) in _NORMS and m.track_running_stats]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found: Forwards = {}
    for conv, norm in pairs:
        if calls[conv] == calls[norm] == 1:
            found |= {conv: _folded(conv, norm), norm: lambda x: x}
    return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunctionSubclass():  # what crosses modules may be a tensor that tells its users
        return tensor.data_ptr(), tensor.shape, tensor.stride()


@torch.no_grad()
def _folded(conv: Any, norm: Any) -> Callable[[Tensor], Tensor]:
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    weight = conv.weight * scale.reshape(-1, *[1] * (conv.weight.ndim - 1))
    bias = (0.0 if conv.bias is None else conv.bias) - norm.running_mean
    bias = bias * scale + (0.0 if norm.bias is None else norm.bias)
    return lambda x: conv._conv_forward(x, weight, bias)
